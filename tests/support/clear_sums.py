"""What a secure run of an in-process fleet gives without masks, on the same integers.

Each upload of an agent is made once more without masks: its change, rounded as its card says. The
integers of the survivors are summed in 64 bits. Mean, strategy and version are the run's own.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.clientapp.secure_files import SecureFiles
from agent.home.secure_store import TurnKey, TurnStore, key_of
from coordinator import strategies
from coordinator.runs import aggregation
from coordinator.storage.run_events import VersionCommitted
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.runner import Aggregation, InputUpdate
from coordinator.strategies.state import StateStore
from protocols.codecs import delta
from protocols.codecs.delta import FlatLayout
from protocols.messages.envelope import Metrics
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.secagg import masked_file, ring, tails
from protocols.privacy.secagg.cohort import Cohort
from protocols.privacy.secagg.keys import CardSecrets
from protocols.privacy.secagg.turn import Masking
from tests.support.in_process_fleet import Agent, Fleet


class Integers(NamedTuple):
    """What a peer adds to the sum: its update int64[n], and its metrics uint64[m]."""

    update: npt.NDArray[np.int64]
    metrics: npt.NDArray[np.uint64]


class ClearSums:
    """The integers of the uploads of one run, by turn and peer."""

    def __init__(self, fleet: Fleet, run: str) -> None:
        self._fleet, self.run, self._lock = fleet, run, threading.Lock()
        self._folder = fleet.folder / "clear"
        self._folder.mkdir()
        self.cohorts: dict[TurnKey, Cohort] = {}
        self.sent: dict[TurnKey, dict[str, Integers]] = defaultdict(dict)
        self._bases: dict[str, Weights] = {}
        for agent in fleet.agents:
            self._watch(agent)

    def _watch(self, agent: Agent) -> None:
        send = agent.send

        def send_and_keep(digest: str, path: Path) -> None:
            with self._lock:
                self._keep(agent, digest)
            send(digest, path)

        agent.send = send_and_keep  # type: ignore[method-assign]

    def _keep(self, agent: Agent, digest: str) -> None:
        with closing(TurnStore(agent._folder)) as store:
            turn = store.newest(self.run)
        result = SecureFiles(agent._folder / "secure").result()
        if turn is None or turn.upload != digest:
            return  # the first weights, or a part of them
        assert turn.cohort is not None
        assert result is not None
        key = key_of(turn)
        cohort = self.cohorts.setdefault(key, Cohort(turn.cohort, is_checked=True))
        seed = CardSecrets(turn.master).rounding_seed(cohort.id)
        without_masks = Masking(cohort, cohort.weights[agent.peer], [], [], seed)
        both: tuple[Weights, Weights] | None = None
        if turn.ready.kind == "train":
            base = turn.ready.base
            if base not in self._bases:
                self._bases[base] = self._fleet.version(base)
            both = agent.trainer.made[turn.ready.round], self._bases[base]
        numbers = tails.values(
            cohort.plan.names,
            result.metrics,
            result.tallies,
            without_masks.weight,
            max(cohort.weights.values()),
        )
        path = self._folder / "integers"
        assert masked_file.write(without_masks, both, numbers, path)[0] != digest
        integers = weights.load(path)
        self.sent[key][agent.peer] = Integers(
            np.asarray(integers["w"]).astype(np.int64), np.asarray(integers["t"]).view("<u8")
        )

    def commit(self, committed: list[VersionCommitted]) -> list[tuple[str, Metrics]]:
        """The version of each round, and the mean metrics of its training."""
        store, made = WeightStore(self._folder), list[tuple[str, Metrics]]()
        states, state = StateStore(store.states), dict[str, str]()
        run = self._fleet.hub.runs.find(self.run)
        adapter, args = strategies.find(run.spec.strategy), run.spec.strategy_args
        base = self._bases[committed[0].parent]
        for one in committed:
            key = max(key for key in self.sent if (key.round, key.kind) == (one.round, "train"))
            sums, cohort = [self.sent[key][peer] for peer in one.contributors], self.cohorts[key]
            mean = self._mean(cohort, one.contributors, [each.update for each in sums], base)
            examples = sum(cohort.cards[peer].examples for peer in one.contributors)
            numbers = ring.decode_tail(np.sum([each.metrics for each in sums], axis=0))
            metrics = tails.means(cohort.plan.names, numbers)[0]
            for_all = aggregation.metrics_for_all(run, metrics, examples, len(sums))
            updates = [InputUpdate(mean, 1.0, 1.0, examples, {})]
            aggregated = Aggregation(
                *(adapter, adapter.make(args), args, one.round, base, base, updates, for_all),
                *(states, state),
            )
            digest = aggregation.store_version(store, aggregated)
            made.append((digest, metrics))
            base, state = weights.load(store.version_path(digest)), aggregated.new_state
        return made

    def _mean(
        self,
        cohort: Cohort,
        survivors: tuple[str, ...],
        updates: list[npt.NDArray[np.int64]],
        base: Weights,
    ) -> Weights:
        total = np.sum(updates, axis=0)
        assert np.abs(total).max() < 2 ** (cohort.plan.ring - 1), "the sum does not wrap"
        total_weight, mean = sum(cohort.weights[peer] for peer in survivors), {}
        for name, field in FlatLayout(base.schema).fields.items():
            change = ring.dequantize(
                total[field.start : field.start + field.size],
                cohort.plan.limits[field.number],
                cohort.bits,
                total_weight,
            )
            old = np.asarray(base[name])
            mean[name] = delta.add(old.reshape(-1), change, field.dtype).reshape(old.shape)
        return Weights({name: mean.get(name, base[name]) for name in base})
