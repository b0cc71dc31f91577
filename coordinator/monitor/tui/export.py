"""What a page shows, as CSV and as JSON, for other programs. Pure but for `write`."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.fleet.reducer import Event, Fleet, Job, Peer, Run, shown_state
from protocols.errors import CommonweightError

Row = dict[str, Any]


def peer_rows(peers: Sequence[Peer], now: float) -> list[Row]:
    """A row a peer, numbers as numbers; bytes and seconds without units."""
    rows = []
    for peer in peers:
        sent = peer.telemetry
        rows.append(
            {
                "peer": peer.peer,
                "name": peer.name,
                "state": shown_state(peer, now).value,
                "reason": peer.reason,
                "run": peer.run,
                "round": peer.round,
                "flower": peer.flower,
                "seen_s_ago": round(now - peer.seen_at, 1) if peer.seen_at else None,
                "loss": sent.loss if sent else None,
                "diverged": peer.diverged,
                "bytes_up": sent.bytes_up if sent else None,
                "bytes_down": sent.bytes_down if sent else None,
                "version": peer.version,
                "labels": " ".join(f"{key}={value}" for key, value in peer.labels.items()),
            }
        )
    return rows


def round_rows(run: Run | None) -> list[Row]:
    """A row a closed round."""
    rows: list[Row] = []
    for closed in run.rounds if run else []:
        row: Row = msgspec.to_builtins(closed)
        for nested in ("metrics", "norms", "spread", "worst", "spent", "staleness"):
            row[nested] = json.dumps(row[nested])
        rows.append(row)
    return rows


def job_rows(jobs: Sequence[Job]) -> list[Row]:
    """A row a job."""
    rows: list[Row] = []
    for job in jobs:
        row: Row = msgspec.to_builtins(job.changed)
        row |= {"began_at": job.began_at or None, "ended_at": job.ended_at or None}
        row["excused"] = json.dumps(row["excused"])
        rows.append(row)
    return rows


def event_rows(events: Sequence[Event]) -> list[Row]:
    """A row an event."""
    rows: list[Row] = msgspec.to_builtins(list(events))
    return rows


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with a head. A text that a spreadsheet would run as a formula begins with `'`."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: _escape_formula(value) for key, value in row.items()} for row in rows
        )
    return out.getvalue()


def _escape_formula(value: object) -> object:
    dangerous = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if dangerous else value


def write(folder: Path, what: str, rows: Sequence[Row], fleet: Fleet | None) -> list[Path]:
    """`commonweight-WHAT-TIME.csv` and `.json` in `folder`. Raises CommonweightError."""
    name = f"commonweight-{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    told = {"schema_version": 1, "fleet": fleet.fleet if fleet else "", what: rows}
    texts = {".csv": as_csv(rows), ".json": json.dumps(told, ensure_ascii=False, indent=1)}
    paths = []
    for suffix, text in texts.items():
        path = folder / (name + suffix)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as err:
            raise CommonweightError(
                f"cannot write {path}: {err.strerror}", "start the monitor in another folder"
            ) from err
        paths.append(path)
    return paths
