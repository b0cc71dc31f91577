"""Fragments of a model: a run exchanges one in each round, in turn. Pure.

Douillard et al. 2025, arXiv 2501.18512 (section 2.2): layers are dealt to the fragments in turn
("strided"), so each fragment has early and late ones. Coordinator and peers compute the same plan
from the schema.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from protocols.errors import UsageError
from protocols.model.weights import DTYPES, Array, Part, Schema, WeightReader, split_into_pieces

#: A layer by its list and number, such as ("blocks", 3), or other tensors by their first word.
_Unit = tuple[str, int]


def plan(schema: Schema, count: int) -> list[frozenset[str]]:
    """The names of the tensors of each fragment. Each tensor is in one of them.

    Layers with a number in their names are dealt in turn. Others, largest first, go to the fragment
    with the fewest bytes. Raises UsageError if there are fewer than `count` layers.
    """
    units: dict[_Unit, list[str]] = defaultdict(list)
    for name in schema:
        units[_unit_of(name)].append(name)
    if len(units) < count:
        raise UsageError(
            f"the model has {len(units)} layers, which make no {count} fragments",
            f"--fragments {len(units)} or less",
        )
    nbytes = {unit: sum(schema[n].nbytes for n in names) for unit, names in units.items()}
    layers = sorted(unit for unit in units if unit[1] >= 0)
    others = sorted(units.keys() - set(layers), key=lambda unit: (-nbytes[unit], unit))
    found: list[set[str]] = [set() for _ in range(count)]
    sizes = [0] * count

    def put(unit: _Unit, place: int) -> None:
        found[place].update(units[unit])
        sizes[place] += nbytes[unit]

    for number, unit in enumerate(layers):
        put(unit, number % count)
    for unit in others:
        put(unit, min(range(count), key=lambda n: (bool(found[n]), sizes[n], n)))
    return [frozenset(names) for names in found]


def _unit_of(name: str) -> _Unit:
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isascii() and word.isdecimal() and len(word) <= 9:
            return ".".join(words[:place]), int(word)
    return words[0], -1


class Fragment(NamedTuple):
    """The part of a model that a round exchanges: number `number` of `total` fragments."""

    total: int = 1
    number: int = 0

    @classmethod
    def of_round(cls, count: int, number: int) -> Fragment:
        """The fragment of round `number`, from 1."""
        return cls(count, (number - 1) % count) if count > 1 else cls()

    @property
    def is_whole(self) -> bool:
        return self.total == 1

    def names(self, schema: Schema) -> frozenset[str]:
        """Its tensors. Raises UsageError."""
        return frozenset(schema) if self.is_whole else plan(schema, self.total)[self.number]

    def of(self, model: WeightReader) -> WeightReader:
        """The fragment of these weights. Raises UsageError."""
        return model if self.is_whole else Selected(model, self.names(model.schema))

    def slot(self, name: str) -> str:
        """The name of a strategy's state for this fragment: each has its own."""
        return name if self.is_whole else f"{name} {self.number}"

    def slots_of(self, state: Mapping[str, str]) -> dict[str, str]:
        """The state of this fragment, by the names that the strategy has for it."""
        if self.is_whole:
            return dict(state)
        ending = f" {self.number}"
        return {n.removesuffix(ending): to for n, to in state.items() if n.endswith(ending)}


class Selected:
    """Some tensors of other weights."""

    def __init__(self, model: WeightReader, names: Iterable[str]) -> None:
        self.schema = {name: model.schema[name] for name in sorted(names)}
        self.read = model.read


class Spliced:
    """The tensors `names` of `one`, and the other ones of `other`, which has the same schema."""

    def __init__(self, names: Iterable[str], one: WeightReader, other: WeightReader) -> None:
        self.schema = other.schema
        self._names, self._one, self._other = frozenset(names), one, other

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        return (self._one if part.name in self._names else self._other).read(part)


def fill(
    model: WeightReader, names: Iterable[str], pieces: Iterator[dict[Part, Array]]
) -> Iterator[dict[Part, Array]]:
    """All tensors in file order: `pieces` has those in `names`, in that order too, and `model` the
    others."""
    given, kept = frozenset(names), model.schema
    parts = (item for piece in pieces for item in piece.items())
    for name in sorted(kept):
        spec = kept[name]
        size = spec.nbytes // DTYPES[spec.dtype].itemsize
        if name not in given:
            for piece in split_into_pieces({name: spec}):
                yield {part: model.read(part) for part in piece}
            continue
        done = 0
        while done < size:
            part, array = next(parts)
            yield {part: array}
            done = part.stop
    for _ in parts:  # so that `pieces` comes to its end
        raise AssertionError("parts of other tensors")
