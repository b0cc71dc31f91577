"""The names of the failpoints in both programs (`protocols.local.failpoints`)."""

from __future__ import annotations

import re

#: `run.recording.X` and `run.recorded.X` are before and after event X is in the ledger.
RUN_EVENTS = (
    "PeersAsked",
    "WeightsInitialised",
    "RoundOpened",
    "UpdateAccepted",
    "TrainingClosed",
    "VersionCommitted",
    "EvaluationOpened",
    "RoundClosed",
    "RunEnded",
)
#: Before round 1, while peers agree on a schema.
HANDSHAKE = tuple(
    f"run.{step}.{fact}"
    for fact in ("PeerDescribed", "SchemaAgreed")
    for step in ("recording", "recorded")
)
COORDINATOR = (
    *(f"run.recording.{fact}" for fact in RUN_EVENTS),
    *(f"run.recorded.{fact}" for fact in RUN_EVENTS),
    "ledger.inserted",
    "runs.queued",
    "runs.recalled",
    "round.configured",
    "work.pushing",
    "work.pushed",
    "upload.piece",
    "upload.synced",
    "upload.stored",
    "reply.taken",
    "reply.pulled",
    "version.adopted",
    "version.written",
    "version.renamed",
    "updates.dropped",
    "round.pruned",
)
AGENT = (
    "agent.message.taken",
    "agent.outbox.cleared",
    "agent.download.piece",
    "agent.version.fetched",
    "agent.work.done",
    "agent.privacy.charged",
    "agent.outbox.written",
    "agent.upload.piece",
    "agent.upload.done",
    "agent.claim.sending",
    "agent.claim.sent",
)
#: Reached only in inference and analytics jobs.
JOB_EVENTS = ("UnitLeased", "UnitReturned", "UnitVerified", "JobEnded")
JOBS = (
    "job.queued",
    "job.pushing",
    "job.pushed",
    "job.reply.pulled",
    *(f"job.recording.{fact}" for fact in JOB_EVENTS),
    *(f"job.recorded.{fact}" for fact in JOB_EVENTS),
)
AGENT_JOBS = ("agent.unit.done", "agent.unit.kept", "agent.unit.sent")
#: In the work for a Flower app.
AGENT_APPS = ("agent.app.done", "agent.app.kept")
#: The decisions of a secure sum, and its files in the spool.
SECURE_SUMS = (
    *(
        f"run.{when}.{fact}"
        for fact in ("CohortFixed", "SharersFixed", "MaskedUpdateAccepted", "SurvivorsFixed")
        for when in ("recording", "recorded")
    ),
    *(f"secure.{when}.{file}" for file in ("request", "shares") for when in ("writing", "written")),
    *("spool.writing", "spool.written"),
)
#: Around each record of a secure sum (`agent.home.secure_store`).
SECURE = tuple(
    f"agent.secure.{when}.{step}"
    for when in ("recording", "recorded")
    for step in ("begin", "share", "mask", "upload", "agree", "unmask")
)
#: The result of a secure turn, and its masked file, are on disk (`agent.clientapp.secure_work`).
SECURE_FILES = ("agent.secure.kept", "agent.secure.masked")
#: A cohort is given up.
LOST_COHORTS = ("run.recording.CohortLost", "run.recorded.CohortLost", "secure.cleared")
#: All of secure runs. tests/e2e/test_secure.py kills at each of them.
OF_SECURE_RUNS = frozenset({*SECURE_SUMS, *LOST_COHORTS, *SECURE, *SECURE_FILES})
#: Of the extra cluster: a ledger that moves, a version in an object store. tests/extras/cluster
#: kills there.
CLUSTER = (
    "ledger.copied",
    "ledger.loaded",
    "ledger.chosen",
    "ledger.renamed",
    "version.uploaded",
)
TRAINER = ("trainer.begun", "trainer.step", "trainer.trained", "trainer.saved")
NAMES = frozenset(COORDINATOR + HANDSHAKE + JOBS + AGENT + AGENT_JOBS + AGENT_APPS + TRAINER).union(
    CLUSTER, OF_SECURE_RUNS
)


def check(spec: str) -> str:
    """The spec of failpoints, if it names known ones. Raises ValueError."""
    for part in filter(None, spec.split(",")):
        name = re.split("[:=@]", part)[0]
        if name not in NAMES:
            raise ValueError(f"{part!r} is not a failpoint")
    return spec
