"""The benchmark of graphics cards runs everywhere, and claims nothing elsewhere."""

from __future__ import annotations

import re

import pytest

from benchmarks.speed import gpu


def test_the_ratios_of_a_cpu_are_no_claim_about_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PASSES", 1)
    monkeypatch.setattr(gpu, "WARM_UP_STEPS", 1)
    gpu.main(["--device", "cpu", "--steps", "1"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "say nothing about a card" in first
    assert [re.sub(r" [\d.]+", " n", row).split()[-4:] for row in rows] == [["fp32", *"nnn"]] * 2
