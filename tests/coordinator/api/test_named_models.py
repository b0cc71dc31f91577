"""Which version an agent gets by the name of a run or of its task."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.setup import named_models
from protocols.enrollment import identity
from protocols.errors import CommonweightError, UnknownName, Unreachable
from protocols.local.atomic_files import write_private
from protocols.model.weights import file_digest
from tests.support.in_process_fleet import Agent, fleet_of, some_data


def home_of(agent: Agent) -> Path:
    """The agent's folder, with its keys as files."""
    keys = {"sign.key": agent.machine.sign_key, "node.key": agent.machine.node_key}
    for name, key in keys.items():
        write_private(agent._folder / name, identity.private_pem(key))
    return agent._folder


async def test_an_agent_gets_the_best_version_of_a_run_or_task_also_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))

    async with fleet_of(tmp_path, some_data(60, 1), some_data(60, 2)) as fleet:
        home = home_of(fleet.agents[0])
        with pytest.raises(UnknownName, match="no run and no task 'softmax'") as caught:
            await asyncio.to_thread(named_models.fetch, home, "softmax", "best")
        assert caught.value.hint == "the operator sees all versions: commonweight models list"
        runs = [await fleet.finished(fleet.start(rounds=n, quorum=2)) for n in (1, 3)]
        best = runs[1].best
        assert best is not None
        for name in ("softmax", runs[1].id, runs[1].id[:-1]):
            path, model = await asyncio.to_thread(named_models.fetch, home, name, "best")
            assert (model.run, model.task) == (runs[1].id, "softmax")
            assert (model.digest, model.round) == (best.digest, best.round)
            assert file_digest(path) == model.digest
        path, model = await asyncio.to_thread(named_models.fetch, home, runs[0].id, "latest")
        assert model.digest == file_digest(path) == runs[0].head
        for wrong in ("softmix", "../softmax", "soft max", "./pets.py:Pets", ""):
            with pytest.raises(UnknownName):
                await asyncio.to_thread(named_models.fetch, home, wrong, "best")

    # The coordinator has ended: what was fetched under this name is used.
    path, model = named_models.fetch(home, "softmax", "best")
    assert model.digest == file_digest(path) == best.digest
    path.write_bytes(b"damaged")
    for name in ("softmax", "another"):
        with pytest.raises(Unreachable):
            named_models.fetch(home, name, "best")


def test_at_most_two_fetched_models_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / named_models.FOLDER
    folder.mkdir()
    for digest in "abc":
        (folder / f"{digest * 64}.safetensors").write_bytes(b"")
    named_models._drop_old(folder)
    assert len(list(folder.iterdir())) == named_models.MAX_MODELS


def test_a_machine_that_has_not_joined_gets_no_model(tmp_path: Path) -> None:
    with pytest.raises(CommonweightError, match="has not joined"):
        named_models.fetch(tmp_path, "softmax", "best")
