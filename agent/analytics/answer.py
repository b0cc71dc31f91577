"""Answers a query: checks it, computes it, applies disclosure rules or noise, and records it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from agent.analytics import differential_privacy, disclosure_control
from agent.analytics.compute import compute
from agent.analytics.query_log import QueryLog
from agent.data import open_table
from agent.data.arrow_reader import find_files
from agent.data.disclosed_sets import Numbers, ToldSet
from agent.data.table_memory import TableMemory
from agent.home.settings import AgentSettings, data_settings
from protocols.analytics.mergeable_states import Cell, PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import CommonweightError, Refused
from protocols.messages.envelope import strip_controls

_logger = logging.getLogger("commonweight.analysis")


def answer_question(
    question: Query, chosen: AgentSettings, cache: Path, log: QueryLog, memory: TableMemory
) -> bytes:
    """The encoded answer, with results or the reason for a refusal. Records it first.

    `chosen` names the table and what the owner allows; `memory` has the rows that training and
    earlier answers have told about. Raises OSError when the answer cannot be recorded.
    """
    try:
        data = table_fingerprint(chosen.data) if chosen.data else ""
    except (CommonweightError, OSError):
        data = ""  # the reader raises it again below
    if (told := log.find_answer(question, data)) is not None:
        return log.record(replace(question, epsilon=0.0), data, told)
    try:
        told = _compute_answer(question, chosen, cache, log, memory)
    except CommonweightError as err:
        # Others learn the kind of error, not the content of the table.
        words = err.message if isinstance(err, Refused) else f"{err.code}: {err.message}"
        _logger.info("a query was refused: %s", err.message)
        return log.record(question, data, PeerAnswer(refused=strip_controls(words)))
    return log.record(question, data, told)


def _compute_answer(
    question: Query, chosen: AgentSettings, cache: Path, log: QueryLog, memory: TableMemory
) -> PeerAnswer:
    if chosen.analyze == "off":
        raise Refused(
            "the owner of this machine lets nobody ask", "commonweight-agent policy set analyze on"
        )
    disclosure_control.check(question, chosen)
    if chosen.analyze == "ask" and not log.is_allowed(question):
        raise Refused("the owner is asked first", "commonweight-agent questions list")
    with_noise = bool(chosen.analyze_epsilon or question.epsilon)
    if with_noise:
        differential_privacy.check(
            question, chosen.analyze_epsilon or float("inf"), log.spent_epsilon
        )
    reader = open_table(data_settings(chosen, cache))
    reader, numbers = memory.admit(reader, chosen.data_min_count)
    computed = compute(question, reader)
    if with_noise:
        return differential_privacy.add_noise(question, computed)
    guarded = disclosure_control.apply_disclosure_rules(computed, chosen)
    _move_old_sets(log, memory, numbers)
    memory.sets.tell(
        [ToldSet("cell", np.sort(numbers[mask])) for mask in guarded.sets], chosen.data_min_count
    )
    cells = tuple(
        Cell(group, int(computed.members[group].sum()), computed.cells[group])
        for group in guarded.told
    )
    return PeerAnswer(
        rows=computed.rows,
        kept_back=guarded.kept_back,
        kinds={name: str(kind) for name, kind in computed.kinds.items()},
        cells=cells,
    )


def _move_old_sets(log: QueryLog, memory: TableMemory, numbers: Numbers) -> None:
    """Take over what an older version has told. It knew rows by their place in the file."""
    if old := log.old_sets():
        places = (np.flatnonzero(mask) for mask in old)
        memory.sets.remember(
            [ToldSet("cell", np.sort(numbers[place[place < len(numbers)]])) for place in places]
        )
        log.forget_old_sets()


def table_fingerprint(path: str) -> str:
    """A hash of names, sizes and modification times of the table's files."""
    sha = hashlib.sha256()
    for file in find_files(path):
        found = file.stat()
        sha.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]
