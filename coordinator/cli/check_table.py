"""What `commonweight run check` shows: a table of peers and columns, and who fits. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from coordinator.fleet import readings, remedies
from coordinator.fleet.state import Fleet
from coordinator.runs.state import Run
from protocols.errors import CommonweightError
from protocols.messages.states import RunState
from protocols.model.setting_specs import SettingSpec
from protocols.tables import mismatches, preprocessing
from protocols.tables.class_names import ClassCounts
from protocols.tables.statistics import ColumnKind, ColumnStatistics, TableStatistics

#: Of a wider table, only the target and the columns that differ are shown.
_MAX_COLUMNS = 8
_ABSENT = "–"


class CheckReport(NamedTuple):
    """The result of a check. All by the peer's name.

    `fitting`: peers that could train. `misfits`: why the others could not; `absent`: why a peer was
    not asked, and what changes it. `cells`: the kind of each column, or the examples of each class;
    `✗` marks a column that does not fit. `notes`: what the operator should know all the same.
    `settings`: of the task, as peers tell them.
    """

    fitting: list[str]
    misfits: dict[str, str]
    absent: dict[str, str]
    columns: list[str]
    cells: dict[str, dict[str, str]]
    rows: dict[str, int]
    notes: list[str]
    settings: dict[str, SettingSpec]


def make_report(run: Run, fleet: Fleet) -> CheckReport:
    """The report about an ended check."""
    names = {peer: readings.display_name(one) for peer, one in fleet.peers.items()}
    reasons = remedies.absent_peers(fleet, fleet.at)
    misfits = {names.get(p, p): text for p, text in run.refusal_texts.items()}
    fitting = sorted(names.get(p, p) for p in run.declared if p not in run.refusal_texts)
    if run.state is not RunState.FINISHED:  # they described their data, and no run can follow
        misfits |= dict.fromkeys(fitting, run.ended_because)
        fitting = []
    absent = {
        names[peer]: reasons.get(peer, "did not answer in time")
        for peer in sorted(names, key=lambda peer: names[peer])
        if names[peer] not in misfits and names[peer] not in fitting
    }
    cells, notes = _cells(run), _notes(run, names)
    target = str(run.spec.settings.get("target", ""))
    return CheckReport(
        fitting,
        misfits,
        absent,
        _order(cells, target),
        {names.get(peer, peer): row for peer, row in cells.items()},
        {names.get(p, p): t.rows for p, t in _tables(run).items()},
        notes,
        run.card.settings if run.card else {},
    )


def table(report: CheckReport) -> tuple[list[str], list[list[object]]]:
    """The titles and rows of the table."""
    shown = report.columns
    if len(shown) > _MAX_COLUMNS:
        differing = [name for name in shown[1:] if _differs(name, report.cells.values())]
        shown = [shown[0], *differing][:_MAX_COLUMNS]
    rows: list[list[object]] = []
    for name in sorted({*report.fitting, *report.misfits, *report.absent}):
        mark = "✓ fits" if name in report.fitting else "✗" if name in report.misfits else "‖"
        cells = report.cells.get(name, {})
        values = [cells.get(column, _ABSENT if cells else "") for column in shown]
        rows.append([name, mark, report.rows.get(name, ""), *values])
    return ["Peer", "", "Rows", *shown], rows


def explain(report: CheckReport) -> list[str]:
    """Lines below the table: why a peer does not fit or was not asked, and the notes."""
    hidden = len(report.columns) - _MAX_COLUMNS
    lines = ["columns that are alike at all peers are not shown"] if hidden > 0 else []
    if not (report.fitting or report.misfits or report.absent):
        lines.append("no machine has joined yet; next: commonweight ticket create")
    lines += [f"{name}: {text}" for name, text in sorted((report.misfits | report.absent).items())]
    return lines + report.notes


def _tables(run: Run) -> dict[str, TableStatistics]:
    return {p: one for p, one in run.surveyed.items() if isinstance(one, TableStatistics)}


def _cells(run: Run) -> dict[str, dict[str, str]]:
    """By peer and column: its kind, or by class: the number of its examples."""
    tables = _tables(run)
    cells = {
        peer: {name: str(count) for name, count in one.counts.items()}
        for peer, one in run.surveyed.items()
        if isinstance(one, ClassCounts)
    }
    names = {name for one in tables.values() for name in one.columns}
    common = {name: mismatches.common_kind(name, tables) for name in names}
    for peer, one in tables.items():
        cells[peer] = {name: _cell(column, common[name]) for name, column in one.columns.items()}
    return cells


def _cell(column: ColumnStatistics, common: ColumnKind) -> str:
    if mismatches.is_alike(column.kind, common):
        return column.kind
    looks = {"comma": "1,5", "local date": "31.3."}.get(column.written, "")
    return f"✗ {column.kind}" + (f" ({looks})" if looks else "")


def _order(cells: Mapping[str, Mapping[str, str]], target: str) -> list[str]:
    names = {name for row in cells.values() for name in row}
    first = [target] if target else []
    return [*first, *sorted(names - {target})]


def _differs(name: str, rows: Iterable[Mapping[str, str]]) -> bool:
    return len({row.get(name, _ABSENT) for row in rows}) > 1


def _notes(run: Run, names: Mapping[str, str]) -> list[str]:
    tables = _tables(run)
    if not tables:
        return []
    try:
        notes = preprocessing.derive(tables, run.spec.settings).notes
    except CommonweightError as err:
        return [err.message]
    return [f"{names.get(peer, peer)}: {text}" if peer else text for peer, text in notes]
