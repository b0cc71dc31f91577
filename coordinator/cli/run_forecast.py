"""What is said before a run starts: its secure sum, its noise, what a Flower app cannot have."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.cli import noise_forecast, secure_forecast
from coordinator.remote.api_client import Remote
from coordinator.runs.apps import rules
from coordinator.storage.run_events import RunSpec


def lines(remote: Remote, spec: RunSpec) -> Iterator[str]:
    """Lines about a run that this spec would start; nothing for most runs."""
    if rules.is_app(spec):
        yield from rules.notes(spec)
    if not spec.secure and spec.measures:
        return
    enrolled = sum(peer.standing == "enrolled" for peer in remote.fleet().peers.values())
    yield from secure_forecast.lines(spec, enrolled)
    if spec.measures:
        return
    earlier = [run.id for run in remote.runs() if run.spec.task == spec.task and run.head]
    known = noise_forecast.known_from(remote.run(earlier[-1]) if earlier else None)
    yield from noise_forecast.lines(spec, enrolled, known)
