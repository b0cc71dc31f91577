"""A fleet inside a fleet gives the weights that one fleet of all machines would give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.storage import run_events
from tests.e2e.test_secure import facts
from tests.e2e.test_tabular import joined
from tests.support.fleet_harness import ALLOW, ROOT, Fleet, fleet
from tests.support.tables import MIXED, write_csv
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

#: The task of the docs: without torch, and each peer's data count by their number.
TASK = {"COMMONWEIGHT_AGENT_TASK_FILES": f"line.py:Line={ROOT}/docs/examples/line.py:Line"}
TRAINING = ("line.py:Line", "--rounds", "2", "--set", "steps=8")
POINTS = {"ann": 30, "bob": 70, "cyd": 200, "dan": 120}


@contextmanager
def two_levels(folder: Path, **settings: str) -> Iterator[tuple[Fleet, Fleet]]:
    """A fleet, and one below whose coordinator joins it."""
    above, below = folder / "top", folder / "low"
    above.mkdir()
    below.mkdir()
    with fleet(above, **settings) as top, fleet(below, **settings) as low:
        top.up()
        ticket = below / "ticket"
        ticket.write_text(top.ticket())
        low.up("--upstream", f"file:{ticket}")
        yield top, low


def join(site: Fleet, *names: str) -> None:
    """Let these machines join, each with points of its own."""
    ticket = site.ticket(len(names))
    for name in names:
        rng = np.random.default_rng(POINTS[name])
        x = rng.uniform(-1, 1, POINTS[name])
        points = site.folder / f"{name}.txt"
        np.savetxt(points, np.column_stack((x, 3 * x + rng.standard_normal(len(x)))))
        words = ("join", "-", "--name", name, "--data", str(points), *ALLOW)
        done = site.ask_agent(name, *words, given=ticket)
        assert done.returncode == 0, done.stderr


def trained(
    site: Fleet, quorum: int, out: Path, *options: str
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The latest weights of a run, and what its last evaluation told."""
    run = site.start_run(*TRAINING, "--quorum", str(quorum), *options)
    ended = site.ended_run(run)
    assert ended["state"] == "finished", ended
    assert site.ask("models", "export", run, str(out), "--which", "latest").returncode == 0
    return load_file(out), ended["history"][-1]["metrics"]


def test_two_levels_are_one(tmp_path: Path) -> None:
    flat_folder = tmp_path / "flat"
    flat_folder.mkdir()
    with fleet(flat_folder, **TASK) as flat:
        flat.up()
        join(flat, "ann", "bob", "cyd")
        flat.start("ann", "bob", "cyd")
        expected, told = trained(flat, 3, tmp_path / "flat.safetensors")
    with two_levels(tmp_path, **TASK) as (top, low):
        join(low, "ann", "bob")
        join(top, "cyd")
        low.start("ann", "bob")
        top.start("cyd")
        wait_for(lambda: len(top.data("peers", "list")) == 2, "the fleet below has joined")
        wait_for(lambda: linked(low.folder), "its link is up")
        found, told_above = trained(top, 2, tmp_path / "top.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.any(array)
        np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0)
    assert abs(told["loss"] - told_above["loss"]) < 1e-6


def test_a_fleet_masks_the_sum_of_its_own_peers(tmp_path: Path) -> None:
    """In a secure run of the upper fleet, nobody sees what the fleet below has sent."""
    with two_levels(tmp_path, **TASK) as (top, low):
        join(low, "ann", "bob")
        join(top, "cyd", "dan")
        link = low.folder / "coordinator" / "upstream" / "enrolled.json"
        wait_for(link.exists, "the fleet below has joined")
        machines = ((low, "coordinator/upstream"), (top, "cyd"), (top, "dan"))
        ids = [
            json.loads((site.folder / name / "enrolled.json").read_bytes())["peer"]
            for site, name in machines
        ]
        for (site, name), own in zip(machines, ids, strict=True):
            for peer in ids:
                if peer != own:
                    done = site.ask_agent(name, "trust", "add", peer)
                    assert done.returncode == 0, done.stderr
        low.start("ann", "bob")
        top.start("cyd", "dan")
        wait_for(lambda: linked(low.folder), "its link is up")
        plain, _ = trained(top, 3, tmp_path / "plain.safetensors")
        secure, _ = trained(top, 3, tmp_path / "secure.safetensors", "--secure")
        newest = top.data("run", "list")[-1]["id"]
        updates = [one for one in facts(top, newest) if isinstance(one, run_events.UpdateAccepted)]
    assert len(updates) >= 6
    for told in (accepted.update for accepted in updates):
        assert (told.metrics, told.norm) == ({}, 0.0)
    for name, array in plain.items():
        # The integers of the sum have steps of about 2e-5 for the clip norm 10.
        np.testing.assert_allclose(secure[name], array, atol=1e-3, rtol=0)


def linked(low: Path) -> bool:
    try:
        status = json.loads((low / "coordinator" / "upstream" / "status.json").read_bytes())
    except FileNotFoundError:
        return False
    return bool(status["session"] and status["mqtt"])


def test_why_a_fleet_inside_a_fleet_refuses_is_told_in_words(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")
    with two_levels(tmp_path) as (top, low):
        joined(low, "ann", write_csv(low.folder / "ann.csv", MIXED))
        low.start("ann")
        wait_for(lambda: top.data("peers", "list"), "the fleet has joined the upper one")
        top.start_run("tabular", "--target", "label", "--rounds", "1", "--quorum", "1")
        words = "categories and classes are not agreed on over two levels of fleets"
        wait_for(lambda: words in top.programs["up"].log, "the upper fleet's log says why")
        # The reason of a peer two levels below, once, and the run ends.
        wrong = ("tabular", "--target", "nothing", "--rounds", "1", "--quorum", "1")
        ended = top.ended_run(top.start_run(*wrong))
        why = "the fleet below cannot do it: no peer can take part: column nothing: expected"
        assert why in ended["ended_because"]
        assert top.programs["up"].log.count("refused") == 2
