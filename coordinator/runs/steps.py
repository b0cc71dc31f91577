"""The steps of a run: what `runs.decisions` decides and `runs.step_executor` carries out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from coordinator.storage.run_events import Holding, WorkGiven
from protocols.messages.states import RunState
from protocols.tables.model_scores import Model

#: Peers that are awaited are named up to this number.
_MAX_NAMED_PEERS = 4
#: The report about a peer that goes away, after its name.
LEFT = "disconnected during its work"


class AskPeers(NamedTuple):
    """Send the open request to these peers. `opens_phase`: its deadline restarts."""

    peers: tuple[str, ...]
    opens_phase: bool = False


class AgreeSchema(NamedTuple):
    """Derive the common schema or preprocessing from the peers' descriptions."""


class ChooseModel(NamedTuple):
    """Choose the model of the run by the scores of the peers."""


class BeginModel(NamedTuple):
    """Begin another model, or the same one again. `because`: why the one before it has ended."""

    model: Model
    because: str


class FetchVersion(NamedTuple):
    """Fetch this version, the newest that any peer has."""

    version: Holding


class KeepOwn(NamedTuple):
    """Continue from the backup's own version: no peer has a newer one."""


class OpenRound(NamedTuple):
    round: int
    base: str
    eligible: tuple[str, ...]


class AssignWork(NamedTuple):
    """Buffered: assign training to each of these peers."""

    given: tuple[WorkGiven, ...]


class CloseTraining(NamedTuple):
    contributors: tuple[str, ...]


class FixCohort(NamedTuple):
    """Secure: begin the sum over the peers that have answered."""


class FixSharers(NamedTuple):
    """Secure: continue with the peers that have shared their secrets."""


class FixSurvivors(NamedTuple):
    """Secure: continue with the peers whose masked updates are here."""


class LoseCohort(NamedTuple):
    """Secure: give the sum up."""

    because: str


class Aggregate(NamedTuple):
    contributors: tuple[str, ...]


class OpenEvaluation(NamedTuple):
    eligible: tuple[str, ...]


class CloseRound(NamedTuple):
    """Evaluate the replies and close the round."""


class EndRun(NamedTuple):
    state: RunState
    because: str


class Wait(NamedTuple):
    """Do nothing until something changes. `peers`: those that are awaited."""

    what: str
    peers: tuple[str, ...] = ()

    def text(self, name_of: Callable[[str], str]) -> str:
        """What the run waits for, with the peers' names if they are few."""
        if not 0 < len(self.peers) <= _MAX_NAMED_PEERS:
            return self.what
        return f"{self.what} ({', '.join(map(name_of, self.peers))})"


Step = (
    AskPeers
    | AgreeSchema
    | ChooseModel
    | BeginModel
    | FetchVersion
    | KeepOwn
    | OpenRound
    | AssignWork
    | CloseTraining
    | FixCohort
    | FixSharers
    | FixSurvivors
    | LoseCohort
    | Aggregate
    | OpenEvaluation
    | CloseRound
    | EndRun
    | Wait
)


def count_peers(number: int) -> str:
    return f"{number} peer" + ("s" if number != 1 else "")
