"""Chooses the sequences of a journey, and runs them: pairs of operations that are new come first.

A sequence is the life of one fleet. It is planned from the model alone: the same seed gives the
same sequence, with a fleet or without.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.journeys import (
    coordinator_operations,  # noqa: F401 - each module registers its operations
    invariants,
    peer_operations,  # noqa: F401
)
from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import Model
from tests.journeys.operations import OPERATIONS
from tests.journeys.run_operations import options, until_finished, words_of

T = TypeVar("T")
Pair = tuple[str, str]

#: Steps that take longer are shown with their time.
SLOW_S = 10.0


class Violation(BaseException):
    """An invariant does not hold. Not an Exception: hypothesis would play the sequence again."""


@contextmanager
def violations_of_errors() -> Iterator[None]:
    """Turns every error of the block into a Violation."""
    try:
        yield
    except AssertionError as err:
        raise Violation(str(err)) from err
    except Exception as err:
        raise Violation(traceback.format_exc()) from err


class Coverage:
    """The ordered pairs of operations that were planned and that were run."""

    def __init__(self, possible: int = 0) -> None:
        self.possible = possible
        self.planned: set[Pair] = set()
        self.run: set[Pair] = set()
        self.steps = self.sequences = 0


def possible_pairs() -> set[Pair]:
    """The ordered pairs that some state of the model allows, as far as a long walk finds them."""
    rng, covered, since_new = random.Random(0), set[Pair](), 0
    model, last = Model(), ""
    while since_new < 3_000:
        if since_new % 200 == 199:
            model, last = Model(), ""
        name = plan_order(model, last, covered, rng)[0]
        OPERATIONS[name].apply(model, rng.choice)
        since_new = since_new + 1 if not last or (last, name) in covered else 0
        if last:
            covered.add((last, name))
        last = name
    return covered


def plan_order(model: Model, last: str, covered: set[Pair], rng: random.Random) -> list[str]:
    """The possible operations: those that make a new pair with the last one first."""
    possible = [name for name, one in OPERATIONS.items() if one.is_possible(model)]
    rng.shuffle(possible)

    def rank(name: str) -> tuple[bool, int]:
        onward = sum((name, after) not in covered for after in OPERATIONS)
        return ((last, name) in covered, -onward)

    return sorted(possible, key=rank)


def machine(
    number: int,
    coverage: Coverage,
    make_fleet: Callable[[], JourneyFleet] | None,
    until: float,
    say: Callable[[str], None],
) -> type[RuleBasedStateMachine]:
    """The state machine of one sequence; without a fleet it only plans."""

    class Journey(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.last, self.rng = Model(), "", random.Random(number)
            self.fleet: JourneyFleet | None = None

        @rule(data=st.data())
        def step(self, data: st.DataObject) -> None:
            if make_fleet is not None and time.monotonic() > until:
                return
            if make_fleet is not None and self.fleet is None:
                self.fleet = make_fleet()
                with violations_of_errors():
                    self.fleet.begin()
            made: list[Any] = []

            def choose(among: Sequence[T]) -> T:
                shuffled = self.rng.sample(list(among), len(among))
                made.append(data.draw(st.sampled_from(shuffled)))
                chosen: T = made[-1]
                return chosen

            order = plan_order(self.model, self.last, coverage.planned, self.rng)
            name = data.draw(st.sampled_from(order[:1]))
            deed = OPERATIONS[name].apply(self.model, choose)
            before, self.last = self.last, name
            if before:
                coverage.planned.add((before, name))
            if self.fleet is None:
                return
            say(f"{name} {tuple(map(_short, made)) if made else ''}")
            began = time.monotonic()
            self._run(deed)
            if (took_s := time.monotonic() - began) > SLOW_S:
                say(f"  took {took_s:.0f} s")
            coverage.steps += 1
            if before:
                coverage.run.add((before, name))

        def _run(self, deed: Callable[[JourneyFleet], None]) -> None:
            assert self.fleet is not None
            with violations_of_errors():
                deed(self.fleet)
                if not self.model.active and self.model.available:
                    probe(self.fleet, self.model)
                found = invariants.violations(self.fleet, self.model)
            if found:
                raise Violation("\n".join(found))

        def teardown(self) -> None:
            if self.fleet is not None:
                with violations_of_errors():
                    self.fleet.close()

    return Journey


def _short(value: object) -> object:
    return value if isinstance(value, str | int | tuple) else getattr(value, "id", "")


def probe(fleet: JourneyFleet, model: Model) -> None:
    """A run of two rounds with every peer that is there finishes."""
    chosen = options("synchronous", "fedavg", "fp32", len(model.available), 2, 0)
    run = fleet.start_run(*words_of(chosen))
    until_finished(fleet, run)
    fleet.do("run", "delete", run, "--yes")


def run_sequence(
    number: int,
    steps: int,
    coverage: Coverage,
    make_fleet: Callable[[], JourneyFleet] | None = None,
    until: float = float("inf"),
    say: Callable[[str], None] = note,
) -> None:
    """Run one sequence. Raises Violation."""
    made = seed(number)(machine(number, coverage, make_fleet, until, say))
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=1,
            stateful_step_count=steps,
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
