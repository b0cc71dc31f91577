"""Answers a query: checks it, applies disclosure rules, adds noise if asked to, and records it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from agent.analytics import differential_privacy, disclosure_control
from agent.analytics.compute import CutsOf, Group, Places, Table, find_cells, read_table
from agent.analytics.cut_points import CutPoints
from agent.analytics.figures import WITHHELD, Figure, compute_figure, min_product_rows
from agent.analytics.model_sums import compute_model
from agent.analytics.peer_sets import columns_of
from agent.analytics.query_log import QueryLog, QuestionContext, ToldColumn
from agent.analytics.survival_counts import count_in_turn
from agent.data import disclosed_sets, open_table, sources
from agent.data.arrow_reader import find_files, map_errors
from agent.data.disclosed_sets import Numbers
from agent.data.settings import DataSettings
from agent.data.table_memory import TableMemory
from agent.data.value_map import with_values
from agent.home.privacy_ledger import Charge, Limit
from agent.home.settings import data_settings
from agent.home.settings_schema import AgentSettings
from protocols.analytics import parser
from protocols.analytics.answer_size import max_answer_bytes
from protocols.analytics.mergeable_states import Cell, PeerAnswer, WithheldState
from protocols.analytics.query import Operation, Query
from protocols.analytics.row_sets import FigureRows
from protocols.errors import CommonweightError, NotAllowed, Refused
from protocols.messages.envelope import strip_controls
from protocols.privacy.events import Exact

_logger = logging.getLogger("commonweight.analysis")

#: Answers under other rules, such as those of older versions, are not given again.
_RULES = 3
#: Settings that decide what an answer may tell.
_LIMITS = (
    *("data_columns", "data_values", "data_min_count", "data_extremes", "analyze_operations"),
    *("analyze_epsilon", "analyze_epsilon_per_question", "privacy_max_epsilon"),
)


def answer_question(
    question: Query,
    chosen: AgentSettings,
    cache: Path,
    log: QueryLog,
    memory: TableMemory,
    asked: QuestionContext = QuestionContext(),
) -> bytes:
    """The encoded answer, with results or the reason for a refusal. Records it first.

    `asked`: by whom and how. `chosen` names the table and what
    the owner allows; `memory` has the rows that training and earlier answers disclosed something
    about. Raises OSError when the answer cannot be recorded.
    """
    data = ""
    # One answer at a time: no other process discloses rows between the check and the record.
    with log.writing():
        try:
            _check(question, chosen, log)
            _check_way(question, chosen, log, asked.secure)
            data = _state_of(chosen)
            told = log.find_answer(question, data)
            tells_rows = asked.secure and bool(columns_of(question))
            if told is not None and (told.rows_of or not (tells_rows and told.cells)):
                _remember_way(question, log, asked.secure)
                return log.repeat(question, data, told, asked)
            log.check_room()
            told, sets = _compute_answer(question, chosen, cache, log, memory, tells_rows)
            _charge(question, chosen, log, asked)
            _remember_way(question, log, asked.secure)
        except CommonweightError as err:
            # Others learn the kind of error, not the content of the table.
            words = err.message if isinstance(err, Refused) else f"{err.code}: {err.message}"
            _logger.info("a question was refused: %s. It was: %s", err.message, question)
            return log.record(
                question, data, PeerAnswer(refused=strip_controls(words)), asked=asked
            )
        return log.record(question, data, told, sets, asked)


def _check_way(question: Query, chosen: AgentSettings, log: QueryLog, secure: bool) -> None:
    """Raise Refused if an answer of this machine alone, or one in a sum, would tell too much.

    Noise covers an answer of this machine alone.
    """
    columns = columns_of(question)
    if secure:
        log.peer_sets.check_in_sums(columns)
    elif columns and not question.epsilon:
        if chosen.secure_min:
            raise Refused(
                "the owner answers secure questions alone; in this one the coordinator would see "
                "the answer of each machine",
                "commonweight analyze --secure",
            )
        log.peer_sets.check_alone(columns)


def _remember_way(question: Query, log: QueryLog, secure: bool) -> None:
    """Record an exact answer of this machine alone. One in a sum is recorded with its peers."""
    if not secure and not question.epsilon:
        log.peer_sets.tell_alone(columns_of(question))


def _charge(question: Query, chosen: AgentSettings, log: QueryLog, asked: QuestionContext) -> None:
    """Charge an answer to the owner's ledger. Raises NotAllowed if that exceeds the limit."""
    job, fleet = asked.job, asked.fleet
    if question.epsilon:
        cost = differential_privacy.cost(question)
        charge = Charge("question", job, cost, fleet, str(question), question.epsilon)
        log.ledger.charge(charge, Limit.of(chosen))
    else:
        charge = Charge("question", job or question.digest, (Exact(),), fleet, str(question))
        log.ledger.charge_exact(charge)


def _check(question: Query, chosen: AgentSettings, log: QueryLog) -> None:
    """Raise Refused or UsageError if the owner does not allow the query."""
    if chosen.analyze == "off":
        raise Refused(
            "the owner of this machine allows no questions",
            "commonweight-agent policy set analyze on",
        )
    parser.check_text(question)
    disclosure_control.check(question, chosen)
    differential_privacy.check(question, chosen)
    if chosen.analyze == "ask" and not log.is_allowed(question.for_any_coefficients):
        raise Refused(
            "the owner must allow this question first", "commonweight-agent policy questions list"
        )


def _compute_answer(
    question: Query,
    chosen: AgentSettings,
    cache: Path,
    log: QueryLog,
    memory: TableMemory,
    tells_rows: bool,
) -> tuple[PeerAnswer, list[ToldColumn]]:
    if question.epsilon:
        differential_privacy.check_budget(question, chosen, log.spent_epsilon)
    reader = open_table(data_settings(chosen, cache))
    reader, numbers = memory.admit(reader, chosen.data_min_count)
    reader = with_values(reader, chosen.data_values, chosen.data_formats)
    table = read_table(question, reader, chosen.data_columns, chosen.data_min_count)
    min_rows, used_cuts = chosen.data_min_count, dict[str, CutPoints]()

    def cuts_of(column: str) -> CutPoints:
        if column not in used_cuts:
            used_cuts[column] = log.cuts(column, table.numbers(column), min_rows)
        return used_cuts[column]

    found_cells = find_cells(question, table, cuts_of, min_rows)
    cells = {group: np.sort(numbers[places]) for group, places in found_cells.rows.items()}
    known = [*log.told_figures(), *_told_cells(memory)]
    disclosure = disclosure_control.choose_cells(
        cells, found_cells.indivisible, np.sort(numbers), known, min_rows
    )
    moved = bool(disclosure.cells) and any(cuts.moved for cuts in used_cuts.values())
    sets = disclosure_control.find_new(
        [ToldColumn("", rows) for rows in disclosure.cells.values()], known
    )
    order = np.argsort(numbers)
    places = {
        group: order[np.searchsorted(numbers, rows, sorter=order)]
        for group, rows in disclosure.cells.items()
    }
    if question.epsilon:
        cells_with_noise = differential_privacy.answer(question, table, places)
        told = _answer(table, cells_with_noise, similar=moved)
    else:
        figures, more = _figures(
            question, table, places, numbers, [*known, *sets], cuts_of, min_rows, log
        )
        sets += more
        found = (
            Cell(group, len(rows), tuple(figure.state for figure in of_cell))
            for (group, rows), of_cell in zip(places.items(), figures, strict=True)
        )
        similar = moved or (disclosure.similar and not log.is_known_cells(question))
        told = _answer(table, found, similar)
        if not (moved or disclosure.similar):
            log.remember_cells(question)
    if (size := len(msgspec.json.encode(told))) > (most := max_answer_bytes(question)):
        raise Refused(f"the answer has {size:,} bytes, and at most {most:,} are answered")
    _tell(memory, [one.rows for one in sets if not one.column], min_rows)
    if tells_rows:
        told = replace(told, rows_of=_number_rows(log, numbers, [*places.values()], figures))
    log.time_bins.remember(question, told.cells)
    return told, [one for one in sets if one.column]


def _number_rows(
    log: QueryLog,
    numbers: Numbers,
    cells: Sequence[Places],
    figures: Sequence[Sequence[Figure]],
) -> tuple[tuple[FigureRows, ...], ...]:
    """The rows behind each cell and figure, as other peers may see them. Raises Refused."""
    over = [
        [
            {"": rows},
            *(
                {} if isinstance(one.state, WithheldState) else one.over or {"": rows}
                for one in of_cell
            ),
        ]
        for rows, of_cell in zip(cells, figures, strict=True)
    ]
    told = [rows for of_cell in over for figure in of_cell for rows in figure.values()]
    found = iter(log.peer_sets.number_rows([np.sort(numbers[rows]) for rows in told]))
    return tuple(
        tuple({label: next(found) for label in figure} for figure in of_cell) for of_cell in over
    )


def _told_cells(memory: TableMemory) -> list[ToldColumn]:
    """Sets of rows whose sums, of any column, answers and surveys may have disclosed."""
    return [ToldColumn("", rows) for rows in memory.sets.rows_of("cell", "table")]


def _tell(memory: TableMemory, cells: Sequence[Numbers], min_rows: int) -> None:
    """Record the cells for all other uses of the rows. Raises Refused."""
    try:
        memory.sets.tell([disclosed_sets.ToldSet("cell", rows) for rows in cells], min_rows)
    except NotAllowed as err:
        _logger.info("a question was refused: %s", err.message)
        raise disclosure_control.few_rows(min_rows) from err


def _answer(table: Table, cells: Iterable[Cell], similar: bool) -> PeerAnswer:
    kinds = {name: str(column.kind) for name, column in table.columns.items()}
    told = tuple(cells)
    return PeerAnswer(
        rows=sum(cell.rows for cell in told), similar=similar, kinds=kinds, cells=told
    )


def _figures(
    question: Query,
    table: Table,
    places: Mapping[Group, Places],
    numbers: Numbers,
    known: Sequence[ToldColumn],
    cuts_of: CutsOf,
    min_rows: int,
    log: QueryLog,
) -> tuple[list[tuple[Figure, ...]], list[ToldColumn]]:
    """The figures of each cell, and the sets of rows that they describe.

    An operation is withheld in all cells if its sets must not be disclosed after those in `known`;
    a model is refused, with the reason. Raises Refused.
    """
    columns: list[list[Figure]] = []
    sets: list[ToldColumn] = []
    for operation in question.operations:
        try:
            found, about = disclosure_control.first_allowed(
                _tries(operation, table, places, cuts_of, min_rows, log),
                numbers,
                [*known, *sets],
                min_rows,
                min_product_rows(table, min_rows),
            )
        except Refused as err:
            _logger.info("%s is withheld: %s", operation, err.message)
            if operation.model is not UNSET:
                raise
            columns.append([WITHHELD] * len(places))
            continue
        sets += about
        columns.append(found)
    return list(zip(*columns, strict=True)), sets


def _tries(
    operation: Operation,
    table: Table,
    places: Mapping[Group, Places],
    cuts_of: CutsOf,
    min_rows: int,
    log: QueryLog,
) -> Iterator[list[Figure]]:
    """The figures of the cells. Those of survival may be in other bins, if these are refused."""
    cells = [*places.values()]
    if operation.kind == "survival":
        earlier = log.time_bins.earlier(operation)
        yield from count_in_turn(operation, table, cells, min_rows, earlier)
    else:
        yield [_figure(operation, table, rows, cuts_of, min_rows, log) for rows in cells]


def _figure(
    operation: Operation,
    table: Table,
    rows: Places,
    cuts_of: CutsOf,
    min_rows: int,
    log: QueryLog,
) -> Figure:
    if operation.model is not UNSET:
        return compute_model(operation, table, rows, min_rows, log.spend_equations)
    return compute_figure(operation, table, rows, cuts_of, min_rows)


def _state_of(chosen: AgentSettings) -> str:
    """A hash of the table's content and of the owner's limits, on which an answer depends."""
    sha = hashlib.sha256(f"{_RULES}".encode())
    sha.update(msgspec.json.encode([getattr(chosen, name) for name in _LIMITS]))
    if chosen.data_formats:
        sha.update(msgspec.json.encode(chosen.data_formats))
    if sources.parse(chosen.data).kind != "files":
        sha.update(open_table(DataSettings(path=chosen.data)).fingerprint().encode())
        return sha.hexdigest()[:32]
    for path in find_files(chosen.data) if chosen.data else ():
        with map_errors(path), path.open("rb") as file:
            sha.update(f"{path.name} {path.stat().st_size}\n".encode())
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:32]
