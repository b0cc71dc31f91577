"""The moving picture of the README: its parts, and that the script makes one of the monitor."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.docs.pages import ROOT

SCRIPT = ROOT / "deploy" / "monitor_animation.py"
OWNER = ROOT / "deploy" / "owner_picture.py"
MAX_BYTES = 600_000


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("monitor_animation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(picture: str) -> None:
    """A small, well-formed SVG that moves, loads nothing and runs nothing."""
    check_still(picture, "Fleet", "Rounds", "training", "agent5", "finished")
    assert picture.count("@keyframes") >= 20
    assert "prefers-reduced-motion" in picture


def check_still(picture: str, *words: str) -> None:
    """A small, well-formed SVG with these words that loads nothing and runs nothing."""
    ElementTree.fromstring(picture)
    assert len(picture) < MAX_BYTES
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in picture
    assert "@font-face" not in picture
    for word in words:
        assert word in picture


def test_the_picture_of_the_docs_moves_and_loads_nothing() -> None:
    check((ROOT / "docs" / "monitor.svg").read_text())


def test_what_pictures_share_is_written_once_and_texts_are_above_backgrounds() -> None:
    made = _module()
    behind = [made.Element("rect", str(x), "0", "9", "9", "fill: #000", "") for x in range(9)]
    always = made.Element("text", "0", "1", "9", "", "fill: #fff", "always")
    later = made.Element("rect", "0", "0", "5", "5", "fill: #111", "")
    last = [[always, later]] * (made.STILL + 1)
    film = made.Film([1.0, *([1.0] * len(last))], made.SIZE, "monitor", "make", made.STILL)
    svg = made.animation([[*behind, always], *last], film)
    assert svg.count(">always<") == 1
    assert svg.count("#000") == 1  # one rectangle behind everything, in place of nine
    assert svg.index('width="5"') < svg.index(">always<")
    # Hidden in the first second, visible from then on, also where nothing moves.
    (shown,) = re.findall(r"@keyframes v\d\{0%\{visibility:hidden\}[^}]*\}\}\.v\d\{[^}]*", svg)
    assert "visibility:visible" in shown.rpartition("{")[2]


@pytest.mark.long
def test_the_script_makes_a_picture_of_the_monitor_as_it_is() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_the_script_makes_the_picture_of_the_owners_monitor() -> None:
    done = subprocess.run([sys.executable, OWNER], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    kept = (ROOT / "docs" / "owner-monitor.svg").read_text()
    for picture in (done.stdout, kept):
        check_still(picture, "Policy", "Privacy", "left:", "north-clinic", "training")
