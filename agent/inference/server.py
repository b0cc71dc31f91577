"""Serves predictions over HTTP from the agent's own copy of the shared model.

    POST /predict    rows as CSV with a header line, or as JSON {"rows": [{name: value}, …]}
    GET  /healthz    the current model and its latency

Requests that arrive while the model is busy wait and then form one batch. No request waits for a
batch to fill. A new version replaces the old one between two batches, so no request is dropped.
"""

from __future__ import annotations

import asyncio
import csv
import io
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from protocols.errors import CommonweightError, UsageError

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_ROWS, MAX_WAITING = 4096, 1024
CHECK_EVERY_S = 1.0
_LATENCIES = 10_000
#: Allowed Host headers. Others are refused, against DNS rebinding from a browser.
_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", ""})


class ServedModel(NamedTuple):
    """A loaded model of the task `name`. `predict` yields columns of answers for a CSV file."""

    version: str
    name: str
    predict: Callable[[str], Iterable[Mapping[str, Sequence[Any]]]]


class _PendingRequest(NamedTuple):
    head: bytes
    rows: list[bytes]
    answer: asyncio.Future[dict[str, Any]]


class Busy(CommonweightError, code="busy"):
    """Too many requests are waiting."""


class InferenceServer:
    """Serves one model at a time. `newest(served)` returns a newer one or None; it may block.

    Rows wait in the folder `rows` while the task reads them; None for one of the system.
    """

    def __init__(
        self,
        served: ServedModel,
        newest: Callable[[ServedModel], ServedModel | None],
        rows: Path | None = None,
    ) -> None:
        self._rows = rows
        self.served, self._newest = served, newest
        self._waiting: asyncio.Queue[_PendingRequest] = asyncio.Queue(MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, "model")
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self.requests = self.failed = self.swaps = self.batches = 0

    # --- the work ---

    async def work(self) -> None:
        """Answers requests batch by batch until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and sum(len(a.rows) for a in batch) < MAX_ROWS:
                batch.append(self._waiting.get_nowait())
            by_columns: defaultdict[bytes, list[_PendingRequest]] = defaultdict(list)
            for pending in batch:
                by_columns[pending.head].append(pending)
            for group in by_columns.values():
                self.batches += 1
                answers = await loop.run_in_executor(
                    self._thread, _answer, self.served, group, self._rows
                )
                for pending, answer in zip(group, answers, strict=True):
                    if pending.answer.done():
                        continue  # the client has disconnected
                    if isinstance(answer, CommonweightError):
                        pending.answer.set_exception(answer)
                    else:
                        pending.answer.set_result(answer)

    async def watch(self) -> None:
        """Loads newer versions until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            newer = await asyncio.to_thread(self._newest, self.served)
            if newer is not None:
                self.served, self.swaps = newer, self.swaps + 1

    # --- HTTP ---

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/predict", self._predict, methods=["POST"]),
                Route("/healthz", self._health),
            ]
        )

    async def _predict(self, request: Request) -> Response:
        began = time.monotonic()
        self.requests += 1
        try:
            _check_host(request)
            head, rows = _rows_of(request.headers.get("content-type", ""), await _body(request))
            pending = _PendingRequest(head, rows, asyncio.get_running_loop().create_future())
            if self._waiting.full():
                raise Busy("too many requests are waiting", "try again in a moment")
            self._waiting.put_nowait(pending)
            answer = await pending.answer
        except CommonweightError as err:
            self.failed += 1
            return _refusal(err)
        self._latencies.append(time.monotonic() - began)
        return _json(answer)

    async def _health(self, request: Request) -> Response:
        try:
            _check_host(request)
        except CommonweightError as err:
            return _refusal(err)
        latencies_ms = np.array(self._latencies or [0.0]) * 1000
        return _json(
            {
                "version": self.served.version,
                "task": self.served.name,
                "requests": self.requests,
                "failed": self.failed,
                "batches": self.batches,
                "swaps": self.swaps,
                "p50_ms": float(np.percentile(latencies_ms, 50)),
                "p99_ms": float(np.percentile(latencies_ms, 99)),
            }
        )


def _answer(
    served: ServedModel, batch: list[_PendingRequest], folder: Path | None
) -> Sequence[dict[str, Any] | CommonweightError]:
    """Predicts for a batch; on an error, request by request."""
    try:
        return _predict(served, batch, folder)
    except Exception as err:  # a task may raise anything; the server continues
        if len(batch) > 1:
            return [answer for one in batch for answer in _answer(served, [one], folder)]
        if isinstance(err, CommonweightError):
            return [err]
        return [CommonweightError(f"the task failed: {type(err).__name__}: {err}"[:300])]


def _predict(
    served: ServedModel, batch: list[_PendingRequest], rows: Path | None
) -> list[dict[str, Any]]:
    """Predicts for requests with the same columns. Raises what the task raises."""
    counts = [len(pending.rows) for pending in batch]
    with tempfile.TemporaryDirectory(prefix="commonweight-", dir=rows) as folder:
        source = Path(folder) / "rows.csv"
        source.write_bytes(batch[0].head + b"".join(row for one in batch for row in one.rows))
        columns: dict[str, list[Any]] = {}
        for part in served.predict(str(source)):
            for name, values in part.items():
                columns.setdefault(name, []).extend(values)
    if any(len(values) != sum(counts) for values in columns.values()):
        raise UsageError("the task did not return one prediction per row")
    answers, start = [], 0
    for count in counts:
        mine = {name: values[start : start + count] for name, values in columns.items()}
        if "row" in mine:
            mine["row"] = list(range(count))
        answers.append({"version": served.version, "answers": mine})
        start += count
    return answers


def _rows_of(kind: str, body: bytes) -> tuple[bytes, list[bytes]]:
    """Returns the header line and the rows as CSV. Raises UsageError."""
    try:
        if kind.partition(";")[0].strip() == "application/json":
            rows = msgspec.json.decode(body, type=_Rows).rows
            names = list(rows[0]) if rows else []
            if any(row.keys() != rows[0].keys() for row in rows):
                raise UsageError("all rows must have the same names")
            table: list[list[Any]] = [names, *([row[name] for name in names] for row in rows)]
        else:
            table = [row for row in csv.reader(io.StringIO(body.decode(), newline="")) if row]
    except (msgspec.DecodeError, UnicodeDecodeError, csv.Error) as err:
        raise UsageError(f"cannot read the rows: {err}", "CSV, or JSON: {rows: [...]}") from err
    if len(table) < 2:
        raise UsageError("there are no rows", "send a header line, then one line per row")
    if any(len(row) != len(table[0]) for row in table):
        raise UsageError("a row has more or fewer values than the header")
    head, *lines = (_line(row) for row in table)
    return head, lines


class _Rows(msgspec.Struct):
    rows: list[dict[str, str | int | float | bool | None]]


def _line(row: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow("" if value is None else value for value in row)
    return text.getvalue().encode()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise UsageError(f"more than {MAX_BODY_BYTES:,} bytes", "send fewer rows per request")
    return bytes(body)


def _check_host(request: Request) -> None:
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name not in _HOSTS:
        raise UsageError("this service is for this machine only", "use 127.0.0.1 as the host")


def _refusal(err: CommonweightError) -> Response:
    body = {"code": err.code, "message": err.message, "hint": err.hint}
    return _json(body, 503 if isinstance(err, Busy) else 422)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
