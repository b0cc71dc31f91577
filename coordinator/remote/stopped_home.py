"""Reads the home of a coordinator that is not running: its runs and peers, from the ledger."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from coordinator.api.schema import EvaluationsResponse, PeerRow
from coordinator.fleet.auth import OPERATOR
from coordinator.fleet.reducer import reduce
from coordinator.fleet.registry import Registry
from coordinator.fleet.state import Fleet
from coordinator.remote.access import ACCESS_FILE
from coordinator.remote.api_client import Remote
from coordinator.runs.comparisons import why_no_evaluations
from coordinator.runs.messages import round_body, run_body
from coordinator.runs.recorded import named_run, recorded_ids, recorded_run
from coordinator.runs.state import Run
from coordinator.storage import ca_files, ledger_place
from protocols.enrollment import ca_chain
from protocols.errors import NotRunning
from protocols.local import homes
from protocols.messages.envelope import CoordinatorBody
from protocols.messages.mqtt import SequencedSigner
from protocols.messages.topics import COORDINATOR


def open_remote(home: Path, timeout_s: float = 15.0) -> Remote:
    """The coordinator of this home; its ledger, if it is not running. Raises NotRunning."""
    try:
        return Remote(home, timeout_s)
    except NotRunning:
        if (home / ACCESS_FILE).exists() or not ledger_place.exists(home):
            raise
        return StoppedHome(home)


class StoppedHome(Remote):
    """The same reads as from a coordinator. All other requests raise NotRunning."""

    is_stopped = True

    def __init__(self, home: Path) -> None:
        self.home, self.role, self.address = home, OPERATOR, str(home)

    def close(self) -> None:
        """Nothing is open between two reads."""

    def runs(self) -> list[Run]:
        with ledger_place.reading(self.home) as ledger:
            found = [recorded_run(ledger, run_id) for run_id in recorded_ids(ledger)]
        return [run for run in found if not run.deleted]

    def run(self, name: str) -> Run:
        return named_run(self.runs(), name)

    def evaluations(self, run_id: str) -> EvaluationsResponse:
        run = self.run(run_id)
        return EvaluationsResponse(evaluations=run.evaluations, withheld=why_no_evaluations(run))

    def fleet(self) -> Fleet:
        ca_pem, chain = ca_files.read_public(self.home)
        fleet = Fleet(fleet=ca_chain.fleet_of(ca_pem, chain), name=self.home.name, at=time.time())
        numbered = SequencedSigner(COORDINATOR, lambda _: b"")
        for body in self._bodies():
            reduce(fleet, numbered.next_envelope(body), fleet.at)
        return fleet

    def _bodies(self) -> Iterator[CoordinatorBody]:
        with ledger_place.reading(self.home) as ledger:
            peers = list(Registry(ledger).peers.values())
        for peer in peers:
            if peer.standing != "removed":
                yield peer.changed(has_session=False)
        for run in self.runs():
            yield run_body(run, "")
            yield from (round_body(run.id, closed) for closed in run.history)

    def peers(self) -> list[dict[str, Any]]:
        with ledger_place.reading(self.home) as ledger:
            peers = list(Registry(ledger).peers.values())
        return [
            msgspec.structs.asdict(msgspec.convert(p, PeerRow, from_attributes=True)) for p in peers
        ]

    def mark_exported(self, run_id: str, digest: str) -> None:
        """Record the export in the ledger. Raises HomeLocked while a program uses the home."""
        message, hint = f"another program uses {self.home}", "export when it has ended"
        with (
            homes.hold(self.home, message, hint),
            contextlib.closing(ledger_place.open_ledger(self.home)) as ledger,
        ):
            Registry(ledger).record_read(OPERATOR, f"exported {digest} of run {run_id}")

    def _request(
        self, method: str, path: str, body: bytes = b"", *, into: Path | None = None
    ) -> bytes:
        raise NotRunning(f"no coordinator is running over {self.home}", "start it: commonweight up")
