"""Gives a round's updates to a strategy, and what it makes of them as pieces of the next version.

Three ways (`adapter.Feed`): the mean piece by piece, every reply piece by piece, every reply whole.
The strategy is Flower's own class. What it remembers is put into it before each call and taken out
after, from and to the disk: so the next version follows from the base, the updates and the state
alone, however often the coordinator was restarted in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from coordinator.strategies import averaging
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.failures import strategy_errors
from coordinator.strategies.state import StateStore, StateWriter
from coordinator.transport.flower_records import InMemoryRecord, part_key
from protocols.errors import CommonweightError
from protocols.model import weights
from protocols.model.weights import (
    DTYPES,
    FLOAT_DTYPES,
    PIECE_BYTES,
    Part,
    WeightReader,
    Weights,
    bf16_to_float32,
    float32_to_bf16,
    split_into_pieces,
)

Floats = npt.NDArray[Any]
Piece = dict[Part, npt.NDArray[np.generic]]

#: A piece of every update together is about as large as a piece of the mean; but no piece is
#: smaller than this, or Flower's messages would cost more than the sums.
_MIN_PIECE_BYTES = 64 * 1024
#: The slot of what a class of one's own remembers.
CUSTOM_SLOT = "own"


@dataclass(frozen=True)
class AggregationInput:
    """A round's updates, in the order of the peers' names.

    `origin` is `base`, opened once more: the fold reads that one in a thread of its own.
    `share` adds up to 1 and is for the mean; `examples` are told to strategies that see every
    reply. An update counts as `base + scale · (update - base)` (norm clipping). `metrics` are told
    with each reply, `told` with the one that stands for all.
    """

    round: int
    base: WeightReader
    origin: WeightReader
    updates: Sequence[WeightReader]
    share: Sequence[float]
    scale: Sequence[float]
    examples: Sequence[int]
    metrics: Sequence[Mapping[str, float]]
    told: Mapping[str, float]


class AggregationResult(NamedTuple):
    """`state` is there once all pieces were taken: digests by slot."""

    pieces: Generator[Piece, None, None]
    state: dict[str, str]


def next_version(
    adapter: StrategyAdapter,
    strategy: Strategy,
    work: AggregationInput,
    states: StateStore,
    state: Mapping[str, str],
    fresh: Callable[[], Strategy],
) -> AggregationResult:
    """The version after `work.base`, in file order. Raises CommonweightError while it is taken.

    `fresh` makes a strategy like this one that has not aggregated yet.
    """
    state_after: dict[str, str] = {}
    given = _written(adapter, strategy, work, states, state, fresh, state_after)
    return AggregationResult(given, state_after)


def _written(
    adapter: StrategyAdapter,
    strategy: Strategy,
    work: AggregationInput,
    states: StateStore,
    state: Mapping[str, str],
    fresh: Callable[[], Strategy],
    state_after: dict[str, str],
) -> Generator[Piece, None, None]:
    name, schema, slots = adapter.flower, work.base.schema, adapter.slots(strategy)
    surely_finite = adapter.feed == "mean" and not slots and _is_mean(adapter, work)
    known = {slot: digest for slot, digest in state.items() if slot in slots}
    # Also before the first version: what was begun and failed must leave no trace.
    with strategy_errors(name):
        if adapter.dump_extra(strategy) is not None:
            earlier = (
                states.load(CUSTOM_SLOT, state[CUSTOM_SLOT])
                if CUSTOM_SLOT in state
                else adapter.dump_extra(fresh())
            )
            adapter.load_extra(strategy, earlier or {})
    with states.open(known, schema) as before, states.write(slots, schema) as after:
        feed = {"mean": _by_mean, "parts": _by_parts, "models": _by_models}[adapter.feed]
        for piece in feed(adapter, strategy, work, before, after):
            if not surely_finite:
                _check_finite(piece, schema)
            yield piece
    state_after.update(after.digests)
    with strategy_errors(name):
        remembered = adapter.dump_extra(strategy)
        own = None if remembered is None else Weights(remembered)
    if own is not None:
        state_after[CUSTOM_SLOT] = states.save(own)


def _is_mean(adapter: StrategyAdapter, work: AggregationInput) -> bool:
    """True if the mean is one of updates as the gate has found them, finite: so is it then."""
    moved = any(isinstance(update, averaging.RebasedUpdate) for update in work.updates)
    as_sent = type(adapter).transform_update is StrategyAdapter.transform_update and not moved
    return as_sent and all(scale <= 1 for scale in work.scale)


# --- the three ways --------------------------------------------------------------------------


def _by_mean(
    adapter: StrategyAdapter,
    strategy: Strategy,
    work: AggregationInput,
    before: Any,
    after: StateWriter,
) -> Iterator[Piece]:
    """One reply stands for all: a weighted mean of updates is itself an update.

    `through` may be called for pieces in any order; at the same time, too, if each call had a
    `work.origin` of its own.
    """
    slots = bool(adapter.slots(strategy))

    def through(mean: Piece) -> Piece:
        one = strategy
        if slots or adapter.needs_base:
            base, state = _keyed(_values(work.origin, list(mean), work)), _state(before, mean)
            with strategy_errors(adapter.flower):
                one = copy.copy(strategy)
                adapter.load_state(one, base, state)
            mean = {part: _wide(array) for part, array in mean.items()}
        arrays = _aggregated(adapter, one, work, [_reply(_keyed(mean), work.told)])
        if slots:
            after.put(_taken(adapter, one, {part_key(part): part for part in mean}))
        return {part: arrays[part_key(part)] for part in mean}

    plain = _is_plain_mean(strategy) and not (slots or adapter.needs_base)
    yield from averaging.average(
        work.updates, work.share, work.scale, work.base, _as_it_is if plain else through
    )


def _is_plain_mean(strategy: Strategy) -> bool:
    """True if the strategy makes of one reply that reply: FedAvg's own mean, times its share of 1.

    Flower writes each array out and reads it again on the way: as long as the sums themselves take.
    """
    return type(strategy).aggregate_train is FedAvg.aggregate_train


def _as_it_is(mean: Piece) -> Piece:
    return mean


def _by_parts(
    adapter: StrategyAdapter,
    strategy: Strategy,
    work: AggregationInput,
    before: Any,
    after: StateWriter,
) -> Iterator[Piece]:
    """Every reply, a piece at a time; the piece shrinks as the peers grow in number.

    Pieces are independent: several could be made at once, given open files for each.
    """
    schema = work.base.schema
    limit = max(_MIN_PIECE_BYTES, PIECE_BYTES // len(work.updates))
    for piece in split_into_pieces(schema, limit):
        floats = [part for part in piece if schema[part.name].dtype in FLOAT_DTYPES]
        new: Mapping[str, Floats] = {}
        if floats:
            replies = [
                _reply(_keyed(_values(update, floats, work, scale)), told)
                for update, scale, told in _each(work)
            ]
            new = _aggregated(adapter, strategy, work, replies)
        yield {
            part: _stored(new[part_key(part)], schema[part.name].dtype)
            if part in floats
            else work.base.read(part)
            for part in piece
        }


def _by_models(
    adapter: StrategyAdapter,
    strategy: Strategy,
    work: AggregationInput,
    before: Any,
    after: StateWriter,
) -> Iterator[Piece]:
    """Every reply whole, with the tensors' names and shapes. In one call: never in parallel."""
    schema = work.base.schema
    whole = {
        name: Part(name, 0, int(np.prod(spec.shape)))
        for name, spec in schema.items()
        if spec.dtype in FLOAT_DTYPES
    }

    def model(source: WeightReader, scale: float = 1.0) -> dict[str, Floats]:
        return {
            part.name: array.reshape(schema[part.name].shape)
            for part, array in _values(source, list(whole.values()), work, scale).items()
        }

    state = {
        slot: {part.name: array.reshape(schema[part.name].shape) for part, array in parts.items()}
        for slot, parts in before.read(whole.values()).items()
    }
    base = model(work.base)
    with strategy_errors(adapter.flower):
        adapter.load_state(strategy, base, state)
    replies = [_reply(model(update, scale), told) for update, scale, told in _each(work)]
    new = _aggregated(adapter, strategy, work, replies)
    if adapter.slots(strategy):
        after.put(_taken(adapter, strategy, whole))
    for piece in split_into_pieces(schema):
        yield {
            part: _stored(
                new[part.name].reshape(-1)[part.start : part.stop], schema[part.name].dtype
            )
            if part.name in whole
            else work.base.read(part)
            for part in piece
        }


# --- to and from Flower ----------------------------------------------------------------------


def as_reply(kind: str, arrays: ArrayRecord | None, metrics: Mapping[str, Any]) -> Message:
    """A reply message as Flower's strategies expect it."""
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, reply_to=Message(RecordDict(), 1, kind))


def _reply(arrays: Mapping[str, npt.NDArray[Any]], told: Mapping[str, Any]) -> Message:
    return as_reply("train", InMemoryRecord(arrays), told)


def _aggregated(
    adapter: StrategyAdapter, strategy: Strategy, work: AggregationInput, replies: list[Message]
) -> dict[str, Floats]:
    """What the strategy makes of the replies. Raises CommonweightError."""
    sizes = {
        name: array.shape
        for record in replies[0].content.array_records.values()
        for name, array in record.items()
    }
    # What is not finite is told by `_check_finite`.
    with strategy_errors(adapter.flower), np.errstate(all="ignore"):
        arrays, _ = strategy.aggregate_train(work.round, replies)
        if arrays is None:
            raise CommonweightError("the strategy gave no new weights")
        new: dict[str, Floats] = {}
        for name, shape in sizes.items():
            if name not in arrays:
                raise CommonweightError(f"the strategy gave no weights for {name}")
            new[name] = arrays[name].numpy()
            if new[name].shape != tuple(shape):
                raise CommonweightError(f"the strategy changed the shape of {name}")
            if new[name].dtype.kind not in "biuf":
                raise CommonweightError(f"the strategy gave no numbers for {name}")
    return new


def _each(work: AggregationInput) -> Iterator[tuple[WeightReader, float, dict[str, float]]]:
    for update, scale, count, metrics in zip(
        work.updates, work.scale, work.examples, work.metrics, strict=True
    ):
        yield update, scale, {**metrics, "num-examples": count}


def _values(
    source: WeightReader, parts: list[Part], work: AggregationInput, scale: float = 1.0
) -> dict[Part, Floats]:
    """Parts as float32 or float64, moved towards the base if the update is clipped."""
    schema = work.base.schema
    found = {part: _read(source, part, schema[part.name].dtype) for part in parts}
    if scale != 1.0:
        for part, array in found.items():
            base = _read(work.base, part, schema[part.name].dtype)
            found[part] = (base + scale * (array - base)).astype(array.dtype)
    return found


def _read(source: WeightReader, part: Part, dtype: str) -> Floats:
    array = source.read(part)
    return bf16_to_float32(array) if dtype == "BF16" else _wide(array)


def _wide(array: npt.NDArray[Any]) -> Floats:
    """float16 squared is soon 0 or infinite: strategies calculate with float32 or wider."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _stored(array: Floats, dtype: str) -> npt.NDArray[np.generic]:
    if dtype == "BF16":
        return float32_to_bf16(array.astype(np.float32))
    with np.errstate(over="ignore"):
        return array.astype(DTYPES[dtype])


def _keyed(parts: Mapping[Part, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {part_key(part): array for part, array in parts.items()}


def _state(before: Any, parts: Mapping[Part, object]) -> dict[str, dict[str, Floats]]:
    return {slot: _keyed(arrays) for slot, arrays in before.read(parts).items()}


def _taken(
    adapter: StrategyAdapter, strategy: Strategy, by_name: Mapping[str, Part]
) -> dict[str, dict[Part, Floats]]:
    with strategy_errors(adapter.flower):
        state = adapter.dump_state(strategy, list(by_name))
        return {
            slot: {part: arrays[name].reshape(-1) for name, part in by_name.items()}
            for slot, arrays in state.items()
        }


def _check_finite(piece: Piece, schema: weights.Schema) -> None:
    for part, array in piece.items():
        dtype = schema[part.name].dtype
        if dtype in FLOAT_DTYPES and not weights.is_finite(
            array if dtype == "BF16" else _stored(array, dtype), dtype
        ):
            raise CommonweightError(
                f"the strategy's new weights are not finite ({part.name})",
                "a lower server learning rate, or a strategy that bounds what one peer can do",
            )
