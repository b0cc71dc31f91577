"""What a page shows, as CSV and JSON for other programs. Pure except for `write`."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.fleet.readings import has_presence, shown_reason, shown_state
from coordinator.fleet.state import Event, Fleet, Job, Peer, Run
from coordinator.monitor.peer_table import training_loss
from protocols.errors import CommonweightError
from protocols.local.os_errors import os_errors_as
from protocols.local.spreadsheets import escape_formula

Row = dict[str, Any]


def peer_rows(peers: Sequence[Peer], now: float) -> list[Row]:
    """One row per peer; bytes and seconds as plain numbers."""
    return [
        {
            "peer": peer.peer,
            "name": peer.name,
            "state": shown_state(peer, now).value,
            "reason": shown_reason(peer, now),
            "run": peer.run,
            "round": peer.round,
            "mqtt": has_presence(peer, now),
            "flower": peer.flower,
            "seen_s_ago": round(now - peer.seen_at, 1) if peer.seen_at else None,
            "loss": training_loss(peer),
            "diverged": peer.diverged,
            "bytes_up": peer.telemetry.bytes_up if peer.telemetry else None,
            "bytes_down": peer.telemetry.bytes_down if peer.telemetry else None,
            "version": peer.version,
            "labels": " ".join(f"{key}={value}" for key, value in peer.labels.items()),
        }
        for peer in peers
    ]


def _flat(struct: msgspec.Struct) -> Row:
    """A row of the fields of `struct`; dicts as JSON."""
    row = msgspec.to_builtins(struct)
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}


def round_rows(run: Run | None) -> list[Row]:
    """One row per closed round."""
    return [_flat(closed) for closed in run.rounds] if run else []


def job_rows(jobs: Sequence[Job]) -> list[Row]:
    """One row per job."""
    return [
        _flat(job.changed) | {"began_at": job.began_at or None, "ended_at": job.ended_at or None}
        for job in jobs
    ]


def event_rows(events: Sequence[Event]) -> list[Row]:
    """One row per event."""
    rows: list[Row] = msgspec.to_builtins(list(events))
    return rows


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with a header. Texts that a spreadsheet would run as a formula are quoted."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: escape_formula(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def write(folder: Path, what: str, rows: Sequence[Row], fleet: Fleet | None) -> list[Path]:
    """`commonweight-WHAT-TIME.csv` and `.json` in `folder`. Raises CommonweightError."""
    name = f"commonweight-{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    document = {"schema_version": 1, "fleet": fleet.fleet if fleet else "", what: rows}
    texts = {".csv": as_csv(rows), ".json": json.dumps(document, ensure_ascii=False, indent=1)}
    paths = []
    for suffix, text in texts.items():
        path = folder / (name + suffix)
        with os_errors_as(
            CommonweightError, f"cannot write {path}", "start the monitor in another folder"
        ):
            path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths
