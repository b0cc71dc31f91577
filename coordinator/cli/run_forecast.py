"""Lines before a run starts: its models and how long they may take, its secure sum, its noise, and
the limits of a Flower app."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from coordinator.cli import noise_forecast, secure_forecast
from coordinator.remote.api_client import Remote
from coordinator.runs import model_choice
from coordinator.runs.apps import rules
from coordinator.runs.state import Run
from coordinator.storage.run_events import RunSpec
from protocols.tables.model_scores import is_open


def lines(remote: Remote, spec: RunSpec) -> Iterator[str]:
    """Lines about a run that this spec would start; nothing for most runs."""
    if rules.is_app(spec):
        yield rules.NOTE
    runs = cache(remote.runs)  # a request
    if is_open(spec.task, spec.settings) and model_choice.takes_turns(spec):
        such = [run.id for run in runs() if run.ordered is not None and run.ended]
        yield from model_lines(spec, remote.run(such[-1]) if such else None)
    if not spec.secure and spec.measures:
        return
    enrolled = sum(peer.standing == "enrolled" for peer in remote.fleet().peers.values())
    yield from secure_forecast.lines(spec, enrolled)
    if spec.measures:
        return
    earlier = [run.id for run in runs() if run.spec.task == spec.task and run.head]
    known = noise_forecast.known_from(remote.run(earlier[-1]) if earlier else None)
    yield from noise_forecast.lines(spec, enrolled, known)


def model_lines(spec: RunSpec, before: Run | None) -> Iterator[str]:
    """The models of a run that trains several; and how long such a run took `before`, as the time
    of a round depends on the peers."""
    models, _ = model_choice.fitting_models(spec)
    if len(models) < 2:
        return
    rounds = [f"{model_choice.with_model(spec, model).rounds:,}" for model in models]
    yield (
        f"models: {', then '.join(models)}; at most {', '.join(rounds)} rounds, and each ends when "
        "it gets no better. For one model: --set model=NAME, or --rounds"
    )
    if before is not None:
        minutes = math.ceil(sum(closed.seconds for closed in before.history) / 60)
        yield f"the rounds of the last such run, {before.id}, took {minutes} min in all"
