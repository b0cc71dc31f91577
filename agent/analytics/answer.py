"""Answers a query: checks it, computes it, applies disclosure rules or noise, and records it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from msgspec.structs import replace

from agent.analytics import differential_privacy, disclosure_control
from agent.analytics.compute import compute
from agent.analytics.query_log import QueryLog
from agent.data import open_table
from agent.data.arrow_reader import find_files
from agent.home.settings import AgentSettings, data_settings
from protocols.analytics.mergeable_states import Cell, PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import CommonweightError, Refused
from protocols.messages.envelope import strip_controls

log = logging.getLogger("commonweight.analysis")


def answer_question(question: Query, chosen: AgentSettings, cache: Path, memory: QueryLog) -> bytes:
    """The encoded answer, with results or the reason for a refusal. Records it first.

    `chosen` names the table and what the owner allows. Raises OSError when the answer cannot be
    recorded.
    """
    try:
        data = table_fingerprint(chosen.data) if chosen.data else ""
    except (CommonweightError, OSError):
        data = ""  # the reader raises it again below
    if (told := memory.find_answer(question, data)) is not None:
        return memory.record(replace(question, epsilon=0.0), data, told, ())
    try:
        told, sets = _compute_answer(question, chosen, cache, memory)
    except CommonweightError as err:
        # Others learn the kind of error, not the content of the table.
        words = err.message if isinstance(err, Refused) else f"{err.code}: {err.message}"
        log.info("a query was refused: %s", err.message)
        return memory.record(question, data, PeerAnswer(refused=strip_controls(words)), ())
    return memory.record(question, data, told, sets)


def _compute_answer(
    question: Query, chosen: AgentSettings, cache: Path, memory: QueryLog
) -> tuple[PeerAnswer, tuple[disclosure_control.Bits, ...]]:
    if chosen.analyze == "off":
        raise Refused(
            "the owner of this machine lets nobody ask", "commonweight-agent policy set analyze on"
        )
    disclosure_control.check(question, chosen)
    if chosen.analyze == "ask" and not memory.is_allowed(question):
        raise Refused("the owner is asked first", "commonweight-agent questions list")
    with_noise = bool(chosen.analyze_epsilon or question.epsilon)
    if with_noise:
        differential_privacy.check(
            question, chosen.analyze_epsilon or float("inf"), memory.spent_epsilon
        )
    computed = compute(question, open_table(data_settings(chosen, cache)))
    if with_noise:
        return differential_privacy.add_noise(question, computed), ()
    guarded = disclosure_control.apply_disclosure_rules(computed, chosen, memory.disclosed_sets())
    cells = tuple(
        Cell(group, int(computed.members[group].sum()), computed.cells[group])
        for group in guarded.told
    )
    told = PeerAnswer(
        rows=computed.rows,
        kept_back=guarded.kept_back,
        kinds={name: str(kind) for name, kind in computed.kinds.items()},
        cells=cells,
    )
    return told, guarded.sets


def table_fingerprint(path: str) -> str:
    """A hash of names, sizes and modification times of the table's files."""
    sha = hashlib.sha256()
    for file in find_files(path):
        found = file.stat()
        sha.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]
