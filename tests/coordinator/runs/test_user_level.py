"""Noise in each version for whole peers: what is summed, what it costs, what a crash repeats."""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from coordinator import strategies
from coordinator.admin import backup
from coordinator.cli import run_text
from coordinator.runs import aggregation, decisions, recorder, spec_rules, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Run
from coordinator.storage import noise_key, run_events
from coordinator.storage.run_events import Holding, RunEvent, RunSpec, Update
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from coordinator.strategies.version_noise import VersionNoise, norm_as_folded
from protocols.errors import UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.bfloat16 import float32_to_bf16
from protocols.model.weights import Part, Weights
from protocols.privacy import accountant
from protocols.privacy.events import Gaussian
from protocols.privacy.user_level import PrivateVersions
from tests.support.in_process_fleet import Fleet, some_data
from tests.support.waiting import until

SIZE, CLIP = 40_001, 0.5
FIELDS: dict[str, Any] = {
    "rounds": 4,
    "weighting": "equal",
    "clip_norm": CLIP,
    "dp_user_epsilon": 3.0,
}
SPEC = RunSpec(task="t", quorum=2, **FIELDS)


class Killed(Exception):
    """The coordinator's work ends here."""


ASKED = ("A", "B", "C", "D", "E")


def model(*values: float) -> Weights:
    return Weights({"w": np.full(SIZE, values[0], np.float32), "n": np.array([7], np.int64)})


def moved(by: float, seed: int) -> Weights:
    """A change of the norm `by`, in a direction of its own."""
    way = np.random.default_rng(seed).normal(size=SIZE)
    changed = np.asarray(model(1.0)["w"]) + by * way / np.linalg.norm(way)
    return Weights({"w": changed.astype(np.float32), "n": np.array([9], np.int64)})


class Rounds:
    """A run whose rounds are closed on a real disk."""

    def __init__(self, folder: Path, spec: RunSpec = SPEC) -> None:
        folder.mkdir(exist_ok=True)
        self.store = WeightStore(folder)
        self.log: list[RunEvent] = [run_events.RunStarted(spec)]
        self.log.append(run_events.WeightsInitialised(self.store.save(model(1.0)), "file"))

    @property
    def run(self) -> Run:
        return transitions.replay("r", self.log)

    def train(self, updates: Mapping[str, Weights], asked: tuple[str, ...] = ASKED) -> None:
        number = self.run.round + 1
        self.log.append(run_events.RoundOpened(number, self.run.head, asked))
        for peer, update in sorted(updates.items()):
            digest = weights.digest(update)
            weights.save(update, self.store.uploads.path(peer, digest))
            told = Update(digest=digest, num_examples=1000, metrics={"loss": 1.0}, norm=9.9)
            self.log.append(run_events.UpdateAccepted(number, peer, told))
        self.log.append(run_events.TrainingClosed(number, tuple(sorted(updates))))

    def commit(self) -> aggregation.CommittedVersion:
        """Close the round, as after each start of the coordinator."""
        run, adapter = self.run, strategies.find(self.run.spec.strategy)
        return aggregation.commit(
            run,
            self.store,
            StateStore(self.store.states),
            adapter.make(run.spec.strategy_args),
            run.contributors,
        )

    def close(self) -> None:
        run, made = self.run, self.commit()
        version = run_events.VersionCommitted(run.round, made.digest, run.head, (), made.metrics)
        self.log += [*made.spent, version, run_events.RoundClosed(run.round, {}, 1.0, 0, 0)]
        noise_key.forget(self.store.home)

    def values(self, digest: str) -> np.ndarray[Any, Any]:
        return np.asarray(weights.load(self.store.version_path(digest))["w"])


def test_a_version_is_the_clipped_sum_over_the_peers_asked_with_noise(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "r")
    updates = {"A": moved(30.0, 1), "B": moved(0.2, 2), "D": moved(CLIP, 3)}
    rounds.train(updates)
    made = rounds.commit()
    sigma = PrivateVersions(3.0, 1e-5, 4).noise
    assert made.spent == (run_events.PrivacySpent(1, sigma, CLIP, 5),)
    assert made.metrics == {}  # those of training have no noise
    run = rounds.run
    accepted = sorted(run.updates.items())
    assert (tmp_path / "r" / "noise.key").stat().st_mode & 0o777 == 0o600
    key = noise_key.of_round(noise_key.fix(tmp_path / "r"), "r", 1, run.head, 5, accepted)
    noise = VersionNoise(key, sigma * CLIP / 5).of(Part("w", 0, SIZE))
    changes = [np.asarray(u["w"], np.float64) - 1.0 for u in updates.values()]
    clipped = [c * min(1.0, CLIP / np.linalg.norm(c)) for c in changes]
    # Three of five have answered, and the sum is still divided by five.
    expected = 1.0 + sum(clipped) / 5 + noise
    np.testing.assert_allclose(rounds.values(made.digest), expected, rtol=0, atol=1e-6)
    assert weights.load(rounds.store.version_path(made.digest))["n"].tolist() == [7]


def test_the_noise_is_normal_and_has_the_deviation_that_is_charged() -> None:
    noise = VersionNoise(bytes(32), 2.5)
    whole = noise.of(Part("w", 0, 200_000))
    assert abs(whole.mean()) < 4 * 2.5 / math.sqrt(len(whole))
    assert abs(whole.var() / 2.5**2 - 1) < 4 * math.sqrt(2 / len(whole))
    assert abs((whole**4).mean() / 2.5**4 - 3) < 4 * math.sqrt(96 / len(whole))
    # Each number depends on its place only, and on the tensor's name.
    for start, stop in ((0, 1), (1, 2), (7, 1000), (8, 9), (99_999, 200_000)):
        np.testing.assert_array_equal(noise.of(Part("w", start, stop)), whole[start:stop])
    other = noise.of(Part("v", 0, 200_000))
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.02


def test_a_round_that_is_closed_again_gives_the_same_version_and_no_other_round_its_noise(
    tmp_path: Path,
) -> None:
    rounds = Rounds(tmp_path / "r")
    first = {"A": moved(0.3, 1), "B": moved(0.2, 2)}
    rounds.train(first)
    once = rounds.commit()
    assert rounds.commit() == once  # nothing but the disk is left of the first time
    # The key is still there: another update, another run or another round has other noise.
    of_first = rounds.values(once.digest)
    other = Rounds(tmp_path / "r")
    other.train({**first, "B": moved(0.2, 3)})
    gap = rounds.values(other.commit().digest) - of_first
    deviation = once.spent[0].noise * CLIP / 5
    assert abs(gap.std() / (deviation * math.sqrt(2)) - 1) < 0.05
    # Without the key, the noise is new as well: what was left of it does not show the sum.
    noise_key.forget(tmp_path / "r")
    assert rounds.commit().digest != once.digest


def test_the_norm_is_that_of_the_values_that_are_summed() -> None:
    """Rounding to bf16 can make a change larger than it was sent."""
    base = Weights({"w": float32_to_bf16(np.full(100, 1.0, np.float32))}, {"w": "BF16"})
    sent = Weights({"w": float32_to_bf16(np.full(100, 1.004, np.float32))}, {"w": "BF16"})
    assert norm_as_folded(sent, base) == pytest.approx(10 * 2**-7)
    assert norm_as_folded(base, base) == 0.0


def test_repeated_rounds_count_again_and_the_run_ends_when_its_epsilon_is_spent(
    tmp_path: Path,
) -> None:
    rounds = Rounds(tmp_path / "r")
    for seed in range(2):
        rounds.train({"A": moved(0.1, seed), "B": moved(0.1, 9 + seed)})
        rounds.close()
    digests = [closed.digest for closed in rounds.run.history]
    allowed = SPEC.private_versions
    assert allowed is not None
    assert rounds.run.num_spent == 2
    # The second version is damaged: its round is repeated, but peers have seen it.
    rounds.log.append(run_events.VersionLost(digests[1], digests[0]))
    assert (rounds.run.round, rounds.run.num_spent) == (1, 2)
    rounds.train({"A": moved(0.1, 5), "B": moved(0.1, 6)})
    # Stopped before its version: nothing was spent. A resumed run repeats the round.
    rounds.log += [run_events.RunEnded(RunState.STOPPED, "x"), run_events.RunResumed()]
    assert (rounds.run.round, rounds.run.num_spent) == (1, 2)
    for seed in range(2):
        rounds.train({"A": moved(0.1, seed), "B": moved(0.1, 9 + seed)})
        rounds.close()
    assert (rounds.run.round, rounds.run.num_spent) == (3, 4)
    step = decisions.decide(rounds.run, Observation(frozenset(ASKED)))
    because = "its ε of 3 is spent: 1 of its rounds were repeated"
    assert step == steps.EndRun(RunState.FINISHED, because)
    assert allowed.epsilon_of(4) == pytest.approx(3.0)
    assert allowed.epsilon_of(2) < 3.0 / math.sqrt(2) + 0.1
    charged = [e for e in rounds.log if isinstance(e, run_events.PrivacySpent)]
    assert accountant.epsilon_of([Gaussian(e.noise) for e in charged], 1e-5) == pytest.approx(3.0)


def test_versions_that_a_restored_ledger_lacks_are_spent(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "r")
    rounds.train({"A": moved(0.1, 1), "B": moved(0.1, 2)})
    rounds.close()
    recalled = run_events.VersionRecalled(Holding(3, "f" * 64), "A")
    rounds.log += [run_events.RecallBegun(True), recalled]
    assert (rounds.run.round, rounds.run.num_spent) == (3, 3)
    plain = Run(id="r", spec=RunSpec(task="t", rounds=9), recalling=True)
    assert transitions.apply(plain, recalled).num_spent == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clip_norm": 0.0}, "--dp-user needs --clip-norm"),
        ({"weighting": "examples"}, "needs the same weight for all peers"),
        ({"max_weight_share": 0.5}, "needs the same weight for all peers"),
        ({"outlier_limit": 3.0}, "--dp-user cannot be used with --outlier-limit"),
        ({"mode": "buffered", "buffer": 2, "quorum": 1}, "--mode buffered"),
        ({"late": "fold"}, "--late fold"),
        ({"strategy": "fedmedian"}, "this strategy chooses among them"),
        ({"strategy": "multikrum", "quorum": 9}, "this strategy chooses among them"),
        ({"strategy": "qfedavg"}, "cannot be used with qfedavg"),
        ({"strategy": "scaffold"}, "which needs figures of each peer without noise"),
        ({"patience": 2}, "with --dp-user no metric decides"),
        ({"target": 0.9}, "with --dp-user no metric decides"),
        ({"dp_user_epsilon": 1000.0}, "--dp-user must be"),
        ({"dp_clip": 2.0}, "have no effect without --dp"),
    ],
)
def test_what_the_noise_would_not_hide_is_refused_before_the_start(
    fields: dict[str, Any], words: str
) -> None:
    spec_rules.check(replace(SPEC, dp_delta=1e-6))
    with pytest.raises(UsageError, match=words):
        spec_rules.check(replace(SPEC, **fields))


def test_the_best_version_is_the_newest_and_nothing_is_evaluated() -> None:
    run = Run(id="r", spec=SPEC, state=RunState.EVALUATING, round=1, head="x")
    assert decisions.decide(run, Observation(frozenset(ASKED))) == steps.CloseRound()


def contents_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


async def test_a_killed_run_commits_the_same_version_and_its_key_leaves_no_trace(
    coordinator_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    keys: list[bytes] = []

    def kill(name: str, detail: str = "") -> None:
        if (name, detail) == ("run.recording", "PrivacySpent") and not keys:
            keys.append((coordinator_home / "noise.key").read_bytes())
            backup.write(coordinator_home, tmp_path / "backup.tar", with_versions=True)
            made.extend(path.stem for path in (coordinator_home / "versions").iterdir())
            raise Killed

    monkeypatch.setattr(recorder, "failpoint", kill)
    fleet = Fleet(tmp_path)
    try:
        with contextlib.suppress(Killed):  # as the coordinator stops
            async with fleet.up():
                for seed in range(2):
                    fleet.join(f"agent{seed}", some_data(40, seed))
                await fleet.online(2)
                run_id = fleet.start(quorum=2, **(FIELDS | {"rounds": 2}))
                await until(lambda: bool(keys))
        async with fleet.up() as hub:
            run = await fleet.finished(run_id)
            shown = "\n".join(run_text.describe(run, hub.fleet))
            events = [event.text for event in hub.fleet.events]
    finally:
        await fleet.close()
    assert run.state is RunState.FINISHED
    assert run.history[0].digest in made
    assert [closed.metrics for closed in run.history] == [{}, {}]
    assert any("usually hides the model below 100 peers" in text for text in events)
    assert "privacy: ε 3 of 3 spent after 2 of 2 rounds, for each peer at δ 1e-05" in shown
    kinds = [type(event).__name__ for event in fleet.facts(run_id)]
    assert kinds.count("PrivacySpent") == 2
    assert kinds[kinds.index("VersionCommitted") - 1] == "PrivacySpent"
    # No file has the key, nor has a backup or what the API sends.
    needles = (keys[0], keys[0].hex().encode(), base64.b64encode(keys[0])[:-1])
    copied = (tmp_path / "backup.tar").read_bytes()
    for content in (*contents_of(coordinator_home), copied, msgspec.json.encode(run)):
        assert not any(needle in content for needle in needles)
    assert not (coordinator_home / "noise.key").exists()
