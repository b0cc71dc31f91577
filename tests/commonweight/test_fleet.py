"""`cw.connect()` over a real coordinator in this process, with agents in threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from msgspec.structs import replace

import commonweight as cw
from coordinator.storage import run_events
from protocols.enrollment import certificates, tickets
from protocols.messages.states import RunState
from protocols.model import personalization, weights
from tests.support.in_process_fleet import Fleet, fleet_and_laptop
from tests.support.waiting import until

T = TypeVar("T")


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    async with fleet_and_laptop(tmp_path, monkeypatch) as made:
        yield made


async def in_thread(call: Callable[[], T]) -> T:
    """What a program of its own would do; the coordinator has the loop of this thread."""
    return await asyncio.to_thread(call)


def finished_run(**more: Any) -> cw.Run:
    return cw.connect().train("softmax", rounds=3, quorum=2, **more).wait()


async def test_a_run_from_start_to_model(site: Fleet, tmp_path: Path) -> None:
    def program() -> None:
        fleet = cw.connect()
        assert fleet.role == "operator"
        assert [(p.name, p.standing) for p in fleet.peers()] == [
            ("agent0", "enrolled"),
            ("agent1", "enrolled"),
        ]
        run = fleet.train("softmax", rounds=3, quorum=2)
        rounds = list(run.rounds())
        assert [r.number for r in rounds] == [1, 2, 3]
        assert all(r.metrics["loss"] > 0 and len(r.peers) == 2 for r in rounds)
        assert run.state == "finished"
        assert run.history == tuple(rounds) == tuple(fleet.run("softmax").rounds())
        assert [one.id for one in fleet.runs()] == [run.id]
        assert run.options["rounds"] == 3
        assert run.best is not None

        frame = run.frame()
        assert list(frame.index) == [1, 2, 3]
        assert frame["loss"].tolist() == [r.metrics["loss"] for r in rounds]
        tensors = run.state_dict()
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {"b": (3,), "w": (5, 3)}
        assert not tensors["w"].equal(run.state_dict(rounds[1].digest)["w"])
        assert run.export(tmp_path / "m.safetensors", "latest") == rounds[-1].digest
        with pytest.raises(cw.errors.UnknownName, match="no version 'nonsense'"):
            run.state_dict("nonsense")
        assert repr(run) == f"<Run {run.id}: finished, round 3/3>"
        fleet.close()

    await in_thread(program)


async def test_a_state_dict_has_every_dtype_and_no_control_variates(site: Fleet) -> None:
    values = np.array([[1.5, -2.0]], np.float32)
    tensors: dict[str, Any] = {
        "half": (values.view(np.uint32) >> 16).astype(np.uint16),
        "scalar": np.array(7, np.int64),
        "flags": np.array([True, False]),
        personalization.control_name("half", {}): values,
    }
    digest = site.hub.weight_store.save(weights.Weights(tensors, ["half"]))
    site.hub.runs._append(
        "r-1",
        run_events.RunStarted(run_events.RunSpec(task="softmax", rounds=1)),
        run_events.WeightsInitialised(digest, "ada"),
        run_events.RunEnded(RunState.FINISHED, "done"),
    )
    site.hub.runs._enqueue("r-1")
    found = await in_thread(lambda: cw.connect().run("r-1").state_dict(digest[:12]))
    assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
        "half": "torch.bfloat16",
        "scalar": "torch.int64",
        "flags": "torch.bool",
    }
    assert found["half"].float().tolist() == values.tolist()
    assert found["scalar"].shape == ()


async def test_it_works_inside_a_running_event_loop(site: Fleet) -> None:
    """As in a notebook, whose cells run in a loop."""

    async def cell() -> None:
        assert len(list(finished_run().rounds())) == 3

    await in_thread(lambda: asyncio.run(cell()))


async def test_an_operator_of_another_machine_has_all_of_it(
    site: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ticket(role: Any) -> str:
        made = tickets.new_ticket(
            site.hub.addresses(), certificates.ca_fingerprint(site.keys.ca_pem)
        )
        site.hub.registry.create_ticket(made, ttl_s=60, uses=1, role=role)
        return tickets.encode(made)

    texts = {role: ticket(role) for role in ("operator", "observer")}

    def program() -> None:
        (tmp_path / "ticket.txt").write_text(texts["operator"])
        fleet = cw.join(f"file:{tmp_path / 'ticket.txt'}", name="laptop")
        run = fleet.train("softmax", rounds=2, quorum=2).wait()
        assert set(run.state_dict("latest")) == {"w", "b"}
        again = cw.connect(tmp_path / "laptop").run(run.id)
        assert again.history == run.history
        watcher = cw.join(texts["observer"])
        assert watcher.role == "observer"
        assert len(watcher.peers()) == 2
        with pytest.raises(cw.errors.Refused, match="may only watch"):
            watcher.runs()

    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    await in_thread(program)


async def test_a_waiting_run_says_so_and_can_be_stopped(
    site: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "commonweight")
    first = await in_thread(lambda: cw.connect().train("softmax", rounds=100_000))
    run = await in_thread(lambda: cw.connect().train("softmax", rounds=1))
    rounds = asyncio.create_task(in_thread(lambda: list(run.rounds(every_s=0.02))))
    await until(lambda: f"{run.id}: waits for the end of run {first.id}" in caplog.text)
    await in_thread(run.stop)
    assert await rounds == []
    assert await in_thread(lambda: run.state) == "stopped"
    assert await in_thread(lambda: (run.best, len(run.frame()))) == (None, 0)
    await in_thread(first.stop)


async def test_a_failed_run_is_an_error_that_names_the_refusals(
    site: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    run = await in_thread(lambda: cw.connect().train("unknown", rounds=1))
    with pytest.raises(
        cw.errors.CommonweightError, match="failed: no peer can take part"
    ) as caught:
        await in_thread(run.wait)
    assert caught.value.hint == f"commonweight run show {run.id}"
    assert f"{run.id}: refused agent0: this machine has no task" in caplog.text


class Gait:
    """A task at the top of a file."""


async def test_errors_have_their_class_and_hint(site: Fleet) -> None:
    def program() -> None:
        fleet = cw.connect()
        with pytest.raises(cw.errors.UnknownName, match="no run 'none'") as caught:
            fleet.run("none")
        assert caught.value.hint == "commonweight run list"
        for odd in ("a b", "50%2F?", "#1", "", "a/b"):
            with pytest.raises(cw.errors.UnknownName, match="no run"):
                fleet.run(odd)
        run = fleet.train(Gait, rounds=1)
        assert run.options["task"] == "test_fleet.py:Gait"
        run.stop()
        with pytest.raises(cw.errors.UsageError, match="is not at the top of a file"):
            fleet.train(type("Typed", (), {"__module__": "nowhere"}))
        with pytest.raises(cw.errors.UsageError, match="name one task"):
            fleet.train("")
        with pytest.raises(cw.errors.CannotBeMet, match="a quorum of 3 cannot be met"):
            fleet.train("softmax", quorum=3)

    await in_thread(program)


async def test_models_are_measured_where_the_data_are(site: Fleet) -> None:
    def program() -> tuple[cw.Run, cw.Measurement]:
        run = finished_run()
        return run, cw.connect().measure(f"{run.id}:latest", min_group=1)

    run, found = await in_thread(program)
    assert {(s.peer, s.model, s.metric) for s in found.scores} == {
        (peer, f"{run.id}:latest", "loss") for peer in ("agent0", "agent1")
    }
    values = [s.value for s in found.scores]
    assert found.weighted["loss"][f"{run.id}:latest"] == pytest.approx(sum(values) / 2)
    assert [s.num_examples for s in found.scores] == [20, 20]
    assert list(found.frame().columns) == ["peer", "model", "metric", "value", "num_examples"]


async def test_rows_are_spread_and_answered_in_order(site: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"

    def program() -> int:
        finished_run()
        rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
        fleet = cw.connect()
        count = fleet.scatter(rows, out)
        with pytest.raises(cw.errors.UsageError, match="exists already"):
            fleet.scatter(rows, out)
        return count

    assert await in_thread(program) == 50
    lines = out.read_text().splitlines()
    assert lines[0] == "row,score"
    assert [int(line.partition(",")[0]) for line in lines[1:]] == list(range(50))


async def test_a_plot_has_a_line_for_each_metric(site: Fleet) -> None:
    import matplotlib

    matplotlib.use("agg")

    def program() -> None:
        run = finished_run()
        axes = run.plot("loss")
        assert axes.get_xlabel() == "round"
        assert list(axes.lines[0].get_ydata()) == [r.metrics["loss"] for r in run.history]
        assert len(run.plot(ax=axes).lines) > 1
        with pytest.raises(cw.errors.UnknownName, match="no metric 'los'"):
            run.plot("los")

    await in_thread(program)


async def test_a_notebook_shows_tables_without_markup_of_peers(site: Fleet) -> None:
    known = site.hub.registry.peers
    peer = next(iter(known))
    known[peer] = replace(known[peer], name="<script>alert(1)</script>")

    def program() -> tuple[str, str]:
        fleet = cw.connect()
        return fleet._repr_html_(), finished_run()._repr_html_()

    shown, run = await in_thread(program)
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert run.count("<tr>") >= 5
    assert "finished" in run


def test_without_a_coordinator_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    with pytest.raises(cw.errors.NotRunning) as caught:
        cw.connect()
    assert "commonweight init" in caught.value.hint
    with pytest.raises(cw.errors.NotRunning):
        cw.connect(tmp_path / "nowhere")
