"""Records the peers' comparisons after the end of a run, one for each peer."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from coordinator.runs import comparisons
from coordinator.runs.manager import RunManager
from coordinator.runs.state import Run
from coordinator.storage.run_events import PeerCompared
from protocols.errors import Refused, UnknownName
from protocols.messages.comparisons import Comparison

#: Runs whose details are in memory. Reading one again means reading its whole ledger.
_MAX_RUNS = 4


class _Known(NamedTuple):
    """A run with all details, and the comparisons of its peers."""

    run: Run
    told: dict[str, Comparison]


class ComparisonInbox:
    """Checks and records comparisons."""

    def __init__(self, runs: RunManager) -> None:
        self._runs = runs
        self._known: OrderedDict[tuple[str, int], _Known] = OrderedDict()

    def take(self, peer: str, told: Comparison) -> None:
        """Record it; the same one again changes nothing. Raises UnknownName, Refused."""
        of = next((run for run in self._runs.all() if run.id == told.run), None)
        if of is None:
            raise UnknownName("there is no such run")
        if not of.ended:
            raise Refused("the run has not ended")
        known = self._details(of)
        if (before := known.told.get(peer)) is not None:
            if before != told:
                raise Refused("this peer has told another comparison of the run")
            return
        if why := comparisons.objection(known.run, peer, told):
            raise Refused(why)
        self._runs.record_comparison(told.run, PeerCompared(peer, told))
        known.told[peer] = told

    def _details(self, run: Run) -> _Known:
        key = run.id, run.round  # a run that was resumed has other peers
        if key not in self._known:
            whole = self._runs.find(run.id)
            self._known[key] = _Known(whole, dict(whole.comparisons))
            while len(self._known) > _MAX_RUNS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]
