"""Which runs this machine takes part in, by the peers that its owner trusts. Refuses at once."""

from __future__ import annotations

from agent.home.settings_schema import AgentSettings
from agent.tasks.floors import WITHOUT_DATA
from protocols.errors import AwaitingTrust, BadMessage, NotAllowed
from protocols.messages.work import Work
from protocols.privacy import private_training
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import STEPS, ring_of
from protocols.tables.model_scores import is_open

#: Work that tells something about the owner's rows.
_ABOUT_ROWS = frozenset({"describe", "train", "evaluate"})


def is_secure(work: Work) -> bool:
    """True for work of a secure run."""
    return ring_of(work.codec) > 0


def pins(chosen: AgentSettings) -> Pins:
    """The owner's rule for secure sums."""
    return Pins(frozenset(chosen.trust), chosen.secure_peers)


def check(work: Work, chosen: AgentSettings) -> None:
    """Raise NotAllowed for work of a plain run if the owner allows only secure runs or the peers
    share noise, AwaitingTrust for that of a secure run if the owner trusts too few peers,
    BadMessage for a step of a plain run, or training ahead where it is not counted."""
    if work.kind in STEPS and not is_secure(work):
        raise BadMessage(f"a step {work.kind} of a run that is not secure")
    if work.ahead and (is_secure(work) or private_training.read(work.settings) is not None):
        raise BadMessage("no training ahead (--overlap) in a run that is secure or adds noise")
    if work.ahead and work.kind != "train":  # its result would count as that of training
        raise BadMessage(f"training ahead (--overlap) after the work {work.kind}")
    if work.kind not in _ABOUT_ROWS:
        return
    _check_shared_noise(work, chosen)
    if is_secure(work):
        if work.kind == "describe" and is_open(work.task, work.settings):
            raise NotAllowed(
                "scores of models would tell the metrics of this machine alone, and the run is "
                "secure",
                "run start --secure with --set model=trees or model=linear",
            )
        check_trust(chosen, "run")
    elif chosen.secure_min and work.task not in WITHOUT_DATA:
        raise NotAllowed(
            "the owner takes part in secure runs alone; in this one the coordinator would see the "
            "update of each peer",
            "run start --secure; or on that machine: commonweight-agent policy set secure_min 0",
        )


def check_trust(chosen: AgentSettings, what: str) -> None:
    """Raise AwaitingTrust if the owner trusts too few peers for a secure run or question."""
    if more := chosen.missing_trust:
        raise AwaitingTrust(
            f"this {what} is secure, and the owner trusts {len(chosen.trust)} other peers; a sum "
            f"needs {more} more",
            "on that machine: commonweight-agent trust add ID",
        )


def _check_shared_noise(work: Work, chosen: AgentSettings) -> None:
    """Raise if peers share the noise of a run in which it would not be enough."""
    private = private_training.read(work.settings)
    if private is None or not private.is_shared:
        return
    if not is_secure(work):
        raise NotAllowed(
            "the noise is for a sum with other peers, and this run is not secure: the update would "
            "leave with too little",
            "run start --secure --dp",
        )
    if (missing := private.shared - 1 - len(chosen.trust)) > 0:
        raise AwaitingTrust(
            f"the noise of this run is enough with {private.shared} peers, and the owner trusts "
            f"{len(chosen.trust)} others; a sum needs {missing} more",
            "on that machine: commonweight-agent trust add ID; or run start --dp-shared with fewer",
        )
