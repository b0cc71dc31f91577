"""A fleet inside a fleet gives the weights that one fleet of all machines would give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.fleet_harness import Fleet, fleet, until

pytestmark = pytest.mark.long

ROUNDS = 2
TRAINING = ("mnist", "--rounds", str(ROUNDS), "--set", "epochs=1", "--set", "max_steps=8")


def trained(site: Fleet, quorum: int, out: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The latest weights of a run, and what its last evaluation told."""
    run = site.start_run(*TRAINING, "--quorum", str(quorum))
    ended = site.ended_run(run)
    assert ended["state"] == "finished", ended
    assert site.ask("models", "export", run, str(out), "--which", "latest").returncode == 0
    return load_file(out), ended["history"][-1]["metrics"]


def test_two_levels_are_one(tmp_path: Path) -> None:
    flat_folder, top_folder, low_folder = (tmp_path / name for name in ("flat", "top", "low"))
    for folder in (flat_folder, top_folder, low_folder):
        folder.mkdir()
    with fleet(flat_folder) as flat:
        flat.up()
        flat.join("ann", "bob", "cyd")
        flat.start("ann", "bob", "cyd")
        expected, told = trained(flat, 3, tmp_path / "flat.safetensors")
    with fleet(top_folder) as top, fleet(low_folder) as low:
        top.up()
        ticket = low_folder / "ticket"
        ticket.write_text(top.ticket())
        low.up("--upstream", f"file:{ticket}")
        low.join_parts({"ann": "0/3", "bob": "1/3"})
        top.join_parts({"cyd": "2/3"})
        low.start("ann", "bob")
        top.start("cyd")
        until(lambda: len(top.data("peers", "list")) == 2, "the fleet below has joined")
        until(lambda: linked(low_folder), "its link is up")
        found, told_above = trained(top, 2, tmp_path / "top.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0)
    assert abs(told["accuracy"] - told_above["accuracy"]) < 1e-9


def linked(low: Path) -> bool:
    try:
        status = json.loads((low / "coordinator" / "upstream" / "status.json").read_bytes())
    except FileNotFoundError:
        return False
    return bool(status["session"] and status["mqtt"])
