"""Aggregates a round's updates through a Flower strategy into pieces of the next version.

A strategy gets the updates in one of three ways (`adapter.Feed`): the mean piece by piece, every
reply piece by piece, or every reply whole. The strategy is Flower's own class. Its state is loaded
from disk before each call and stored afterwards, so the next version depends on the base, the
updates and the state only, no matter how often the coordinator was restarted.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from coordinator.storage.run_spec import Setting
from coordinator.strategies import averaging, svd, trees
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.failures import strategy_errors
from coordinator.strategies.state import StateReader, StateStore, StateWriter
from coordinator.transport.flower_records import InMemoryRecord, part_key
from protocols.codecs.registry import FactoredUpdate
from protocols.errors import CommonweightError
from protocols.model import weights
from protocols.model.bfloat16 import widened
from protocols.model.weights import Part, WeightReader

Floats = npt.NDArray[Any]
Piece = dict[Part, npt.NDArray[np.generic]]

#: All updates' pieces together are about as large as a piece of the mean. But no piece is smaller
#: than this, since Flower's messages would then cost more than the sums.
_MIN_PIECE_BYTES = 64 * 1024
#: The slot of the state of a custom strategy.
CUSTOM_SLOT = "own"


class InputUpdate(NamedTuple):
    """One update of a round.

    `share`: its share of the mean; all add up to 1. `scale`: it counts as
    `base + scale · (update - base)`. `num_examples` and `metrics` go into its reply, for strategies
    that see every reply.
    """

    weights: WeightReader
    share: float
    scale: float
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Aggregation:
    """The aggregation of one round. `updates` are in the order of the peers' ids.

    `origin`: `base`, opened once more, because the averaging reads `base` in a thread of its own.
    `metrics`: for the one reply that holds the mean. `state` and `new_state`: digests by slot;
    `new_state` is complete once all `pieces` were taken. `noise`: for the mean, before the strategy
    gets it. `contributors`: whose updates these are.
    """

    adapter: StrategyAdapter
    strategy: Strategy
    strategy_args: Mapping[str, Setting]
    round: int
    base: WeightReader
    origin: WeightReader
    updates: Sequence[InputUpdate]
    metrics: Mapping[str, float]
    states: StateStore
    state: Mapping[str, str]
    noise: averaging.Noise | None = None
    contributors: tuple[str, ...] = ()
    new_state: dict[str, str] = field(default_factory=dict)

    def pieces(self) -> Generator[Piece, None, None]:
        """The version after `base`, in file order. Raises CommonweightError."""
        adapter, strategy, schema = self.adapter, self.strategy, self.base.schema
        slots = adapter.slots(strategy)
        surely_finite = adapter.feed == "mean" and not slots and self._is_mean_of_valid_updates()
        known = {slot: digest for slot, digest in self.state.items() if slot in slots}
        with strategy_errors(adapter.flower):
            extra = adapter.dump_extra(strategy)
            # Also before the first version: a failed attempt must leave no trace.
            if extra is not None:
                if CUSTOM_SLOT in self.state:
                    extra = self.states.load(CUSTOM_SLOT, self.state[CUSTOM_SLOT])
                else:
                    extra = adapter.dump_extra(adapter.make(self.strategy_args))
                adapter.load_extra(strategy, extra or {})
        ways = {
            "mean": self._by_mean,
            "parts": self._by_parts,
            "models": self._by_models,
            "sums": self._by_sums,
            "factors": self._by_factors,
        }
        with self.states.open(known, schema) as before, self.states.write(slots, schema) as after:
            for piece in ways[adapter.feed](before, after):
                if not surely_finite:
                    _check_finite(piece, schema)
                yield piece
        self.new_state.update(after.digests)
        with strategy_errors(adapter.flower):
            extra = adapter.dump_extra(strategy)
            custom = None if extra is None else weights.Weights(extra)
        if custom is not None:
            self.new_state[CUSTOM_SLOT] = self.states.save(custom)

    def _is_mean_of_valid_updates(self) -> bool:
        """True for the mean of updates that validation found to be finite: so is the mean then."""
        if self.noise is not None:
            return False
        rebased = any(isinstance(one.weights, averaging.RebasedUpdate) for one in self.updates)
        as_sent = type(self.adapter).transform_update is StrategyAdapter.transform_update
        return as_sent and not rebased and all(one.scale <= 1 for one in self.updates)

    # --- the three ways ----------------------------------------------------------------------

    def _by_mean(self, before: StateReader, after: StateWriter) -> Iterator[Piece]:
        """One reply stands for all, because a weighted mean of updates is itself an update.

        The pieces are independent of each other and may be made in any order.
        """
        slots, adapter = bool(self.adapter.slots(self.strategy)), self.adapter

        def through_strategy(mean: Piece) -> Piece:
            strategy = self.strategy
            if slots or adapter.needs_base:
                base = _keyed(self._values(self.origin, list(mean)))
                state = {slot: _keyed(arrays) for slot, arrays in before.read(mean).items()}
                with strategy_errors(adapter.flower):
                    strategy = copy.copy(strategy)
                    adapter.load_state(strategy, base, state)
                mean = {part: _to_float32(array) for part, array in mean.items()}
            arrays = self._aggregate(strategy, [_train_reply(_keyed(mean), self.metrics)])
            if slots:
                after.put(self._dump(strategy, {part_key(part): part for part in mean}))
            return {part: arrays[part_key(part)] for part in mean}

        # FedAvg returns a single reply unchanged. Flower serializes each array on the way, which
        # takes as long as the sums themselves.
        is_fedavg = type(self.strategy).aggregate_train is FedAvg.aggregate_train
        is_identity = is_fedavg and not (slots or adapter.needs_base)
        yield from averaging.average(
            [one.weights for one in self.updates],
            [one.share for one in self.updates],
            [one.scale for one in self.updates],
            self.base,
            (lambda mean: mean) if is_identity else through_strategy,
            self.noise,
        )

    def _by_parts(self, before: StateReader, after: StateWriter) -> Iterator[Piece]:
        """Every reply, a piece at a time. Pieces get smaller with more peers.

        The pieces are independent of each other.
        """
        schema = self.base.schema
        limit_bytes = max(_MIN_PIECE_BYTES, weights.PIECE_BYTES // len(self.updates))
        for piece in weights.split_into_pieces(schema, limit_bytes):
            floats = [part for part in piece if schema[part.name].dtype in weights.FLOAT_DTYPES]
            new: Mapping[str, Floats] = {}
            if floats:
                replies = [
                    _reply_of(one, _keyed(self._values(one.weights, floats, one.scale)))
                    for one in self.updates
                ]
                new = self._aggregate(self.strategy, replies)
            yield {
                part: averaging.as_stored(new[part_key(part)], schema[part.name].dtype)
                if part in floats
                else self.base.read(part)
                for part in piece
            }

    def _by_models(self, before: StateReader, after: StateWriter) -> Iterator[Piece]:
        """Every reply whole, with the tensors' names and shapes, in a single call."""
        schema, adapter = self.base.schema, self.adapter
        whole = {
            name: Part(name, 0, int(np.prod(spec.shape)))
            for name, spec in schema.items()
            if spec.dtype in weights.FLOAT_DTYPES
        }

        def shaped(arrays: Mapping[Part, Floats]) -> dict[str, Floats]:
            return {p.name: array.reshape(schema[p.name].shape) for p, array in arrays.items()}

        def model(source: WeightReader, scale: float = 1.0) -> dict[str, Floats]:
            return shaped(self._values(source, list(whole.values()), scale))

        state = {slot: shaped(arrays) for slot, arrays in before.read(whole.values()).items()}
        base = model(self.base)
        with strategy_errors(adapter.flower):
            adapter.load_state(self.strategy, base, state)
        replies = [_reply_of(one, model(one.weights, one.scale)) for one in self.updates]
        new = self._aggregate(self.strategy, replies)
        if adapter.slots(self.strategy):
            after.put(self._dump(self.strategy, whole))
        for piece in weights.split_into_pieces(schema):
            yield {
                part: averaging.as_stored(
                    new[part.name].reshape(-1)[part.start : part.stop], schema[part.name].dtype
                )
                if part.name in whole
                else self.base.read(part)
                for part in piece
            }

    def _by_sums(self, before: StateReader, after: StateWriter) -> Iterator[Piece]:
        """The sums of all updates become the next level of the trees."""
        state: Mapping[str, Any] = {}
        if digest := self.state.get(CUSTOM_SLOT):
            state = self.states.load(CUSTOM_SLOT, digest)
        grown = trees.grow(
            self.base,
            state,
            [one.weights for one in self.updates],
            int(self.metrics["num-examples"]),
            hashlib.sha256("\n".join(sorted(self.contributors)).encode()).digest(),
        )
        if grown.state:
            self.new_state[CUSTOM_SLOT] = self.states.save(weights.Weights(grown.state))
        for piece in weights.split_into_pieces(self.base.schema):
            yield {
                part: grown.version[part.name].reshape(-1)[part.start : part.stop] for part in piece
            }

    def _by_factors(self, before: StateReader, after: StateWriter) -> Iterator[Piece]:
        """The products of all updates become factors again, a layer at a time."""
        yield from svd.aggregate(
            [one.weights for one in self.updates if isinstance(one.weights, FactoredUpdate)],
            [one.share for one in self.updates],
            [one.scale for one in self.updates],
            self.base,
        )

    # --- to and from Flower ------------------------------------------------------------------

    def _aggregate(self, strategy: Strategy, replies: list[Message]) -> dict[str, Floats]:
        """The strategy's new weights. Raises CommonweightError."""
        shapes = {
            name: tuple(array.shape)
            for record in replies[0].content.array_records.values()
            for name, array in record.items()
        }
        # `_check_finite` reports values that are not finite.
        with strategy_errors(self.adapter.flower), np.errstate(all="ignore"):
            arrays, _ = strategy.aggregate_train(self.round, replies)
            if arrays is None:
                raise CommonweightError("the strategy returned no new weights")
            new: dict[str, Floats] = {}
            for name, shape in shapes.items():
                if name not in arrays:
                    raise CommonweightError(f"the strategy returned no weights for {name}")
                new[name] = arrays[name].numpy()
                if new[name].shape != shape:
                    raise CommonweightError(f"the strategy changed the shape of {name}")
                if new[name].dtype.kind not in "biuf":
                    raise CommonweightError(f"the strategy returned no numbers for {name}")
        return new

    def _dump(
        self, strategy: Strategy, by_name: Mapping[str, Part]
    ) -> dict[str, dict[Part, Floats]]:
        with strategy_errors(self.adapter.flower):
            state = self.adapter.dump_state(strategy, list(by_name))
            return {
                slot: {part: arrays[name].reshape(-1) for name, part in by_name.items()}
                for slot, arrays in state.items()
            }

    def _values(
        self, source: WeightReader, parts: list[Part], scale: float = 1.0
    ) -> dict[Part, Floats]:
        """Parts as float32 or float64, moved towards the base if the update is scaled."""

        def read(reader: WeightReader, part: Part) -> Floats:
            return _to_float32(widened(reader.read(part), self.base.schema[part.name].dtype))

        values = {part: read(source, part) for part in parts}
        if scale == 1.0:
            return values
        bases = {part: read(self.base, part) for part in parts}
        return {
            part: (bases[part] + scale * (array - bases[part])).astype(array.dtype)
            for part, array in values.items()
        }


def as_reply(kind: str, arrays: ArrayRecord | None, metrics: Mapping[str, Any]) -> Message:
    """A reply message as Flower's strategies expect it."""
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, reply_to=Message(RecordDict(), 1, kind))


def _train_reply(arrays: Mapping[str, npt.NDArray[Any]], metrics: Mapping[str, Any]) -> Message:
    return as_reply("train", InMemoryRecord(arrays), metrics)


def _reply_of(update: InputUpdate, arrays: Mapping[str, Floats]) -> Message:
    return _train_reply(arrays, {**update.metrics, "num-examples": update.num_examples})


def _to_float32(array: npt.NDArray[Any]) -> Floats:
    """float16 to float32: the squares of float16 soon become 0 or infinite."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _keyed(parts: Mapping[Part, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {part_key(part): array for part, array in parts.items()}


def _check_finite(piece: Piece, schema: weights.Schema) -> None:
    for part, array in piece.items():
        dtype = schema[part.name].dtype
        if dtype in weights.FLOAT_DTYPES and not weights.is_finite(
            array if dtype == "BF16" else averaging.as_stored(array, dtype), dtype
        ):
            raise CommonweightError(
                f"the strategy's new weights are not finite ({part.name})",
                "use a lower server learning rate, or a strategy that bounds what one peer can do",
            )
