"""A fleet on record: what a monitor heard, with its times, to be folded again later.

A file is zstd-compressed JSON lines: a head, then snapshots and messages, each with the seconds
since the start. It is flushed each second, so a killed monitor leaves a file that can be played.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, cast

import msgspec
from msgspec import Meta, Struct

from coordinator.api.schema import StartRunRequest
from coordinator.fleet.state import Fleet
from coordinator.remote.source import Action, Source
from protocols import VERSION
from protocols.errors import UsageError
from protocols.messages.envelope import Envelope, LogLine

# The same module under two names: in the standard library from Python 3.14 on.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT = 1
FLUSH_S = 1.0
MAX_LINE_BYTES = 64 * 1024 * 1024
DEMO_FILE = Path(__file__).with_name("recordings") / "demo.cwrec"


class Head(Struct, frozen=True, kw_only=True):
    """The first line. `at` is Unix s by the clock of the one who recorded."""

    commonweight_recording: int
    version: str
    at: Annotated[float, Meta(ge=0, le=1e11)]


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was heard, `t` seconds after the start."""

    t: Annotated[float, Meta(ge=0, le=1e9)]
    snapshot: Fleet | None = None
    message: Envelope | None = None


_encode = msgspec.json.Encoder().encode
_head = msgspec.json.Decoder(Head)
_line = msgspec.json.Decoder(Line)


class Recorder:
    """Writes a recording. Raises UsageError when the file is there already or cannot be made."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = clock()
        try:
            self._raw = path.open("xb")
        except FileExistsError as err:
            raise UsageError(f"{path} exists already", "choose another name") from err
        except OSError as err:
            raise UsageError(f"cannot write {path}: {err.strerror}") from err
        self._file = zstd.ZstdFile(self._raw, "w")
        self._flushed = 0.0
        self._write(_encode(Head(commonweight_recording=FORMAT, version=VERSION, at=self._began)))

    def snapshot(self, fleet: Fleet) -> None:
        """The coordinator's snapshot as it came."""
        self._write(_encode(Line(t=self._now(), snapshot=fleet)))

    def message(self, envelope: Envelope) -> None:
        """A verified message."""
        self._write(_encode(Line(t=self._now(), message=envelope)))

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def _now(self) -> float:
        return round(max(self._clock() - self._began, 0.0), 3)

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        if time.monotonic() - self._flushed > FLUSH_S:
            self._file.flush(zstd.ZstdFile.FLUSH_BLOCK)  # type: ignore[arg-type]
            self._raw.flush()
            self._flushed = time.monotonic()


def read(path: Path) -> tuple[Head, Iterator[Line]]:
    """The head, and the lines as they are read. Raises UsageError: no recording, or a newer one."""
    try:
        file = cast(IO[bytes], io.BufferedReader(zstd.ZstdFile(path)))
        head = _head.decode(file.readline(4096))
    except OSError as err:
        raise UsageError(f"cannot read {path}: {err.strerror or err}") from err
    except (zstd.ZstdError, EOFError, msgspec.DecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"{path} is no recording of a monitor: {err}") from err
    if head.commonweight_recording != FORMAT:
        raise UsageError(
            f"{path} has format {head.commonweight_recording}; this version plays {FORMAT}",
            "pip install --upgrade commonweight",
        )
    return head, _lines(file, path)


def _lines(file: IO[bytes], path: Path) -> Iterator[Line]:
    with file:
        last = 0.0
        while True:
            try:
                text = file.readline(MAX_LINE_BYTES)
            except (zstd.ZstdError, EOFError):  # cut off: what came before it counts
                return
            if not text.endswith(b"\n"):
                return
            try:
                line = _line.decode(text)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
                raise UsageError(f"{path} is damaged after {last:.0f} s: {err}") from err
            if line.t < last:  # time goes one way
                line = msgspec.structs.replace(line, t=last)
            last = line.t
            yield line


class RecordingSource:
    """A Source that writes down what it brings."""

    def __init__(self, source: Source, recorder: Recorder) -> None:
        self._source, self._recorder = source, recorder

    async def snapshot(self) -> Fleet:
        fleet = await self._source.snapshot()
        self._recorder.snapshot(fleet)
        return fleet

    async def messages(self) -> AsyncIterator[Envelope]:
        async for envelope in self._source.messages():
            self._recorder.message(envelope)
            yield envelope

    async def command(self, peer: str, action: Action, for_s: float = 0.0) -> str:
        return await self._source.command(peer, action, for_s)

    async def ticket(self) -> str:
        return await self._source.ticket()

    async def start_run(self, order: StartRunRequest) -> str:
        return await self._source.start_run(order)

    async def stop_run(self, run: str) -> None:
        await self._source.stop_run(run)

    async def stop_job(self, job: str) -> None:
        await self._source.stop_job(job)

    async def logs(self, peer: str) -> list[LogLine]:
        return await self._source.logs(peer)
