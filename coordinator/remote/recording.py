"""Records what a monitor receives, with times, so that it can be replayed later.

A file is zstd-compressed JSON lines: a head, then snapshots and messages, each with the seconds
since the start. It is flushed every second, so the file of a killed monitor can be replayed.
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

from coordinator.fleet.state import Fleet
from coordinator.remote.source import Source
from protocols import VERSION
from protocols.errors import UsageError
from protocols.messages.decoding import MALFORMED
from protocols.messages.envelope import Envelope

# The same module: part of the standard library since Python 3.14.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT = 1
FLUSH_S = 1.0
MAX_LINE_BYTES = 64 * 1024 * 1024
DEMO_FILE = Path(__file__).with_name("recordings") / "demo.cwrec"


class Head(Struct, frozen=True, kw_only=True):
    """The first line. `at` is Unix s by the recording machine's clock."""

    commonweight_recording: int
    version: str
    at: Annotated[float, Meta(ge=0, le=1e11)]


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot or a message, `t` seconds after the start."""

    t: Annotated[float, Meta(ge=0, le=1e9)]
    snapshot: Fleet | None = None
    message: Envelope | None = None


_encode = msgspec.json.Encoder().encode
_head = msgspec.json.Decoder(Head)
_line = msgspec.json.Decoder(Line)


class Recorder:
    """Writes a recording. Raises UsageError if the file exists already or cannot be created."""

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
        """Record a snapshot as it was received."""
        self._write(_encode(Line(t=self._now(), snapshot=fleet)))

    def message(self, envelope: Envelope) -> None:
        """Record a verified message."""
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
    """The head, and the lines as they are read. Raises UsageError for other or newer files."""
    try:
        file = cast(IO[bytes], io.BufferedReader(zstd.ZstdFile(path)))
        head = _head.decode(file.readline(4096))
    except OSError as err:
        raise UsageError(f"cannot read {path}: {err.strerror or err}") from err
    except (zstd.ZstdError, EOFError, msgspec.DecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"{path} is not a recording of a monitor: {err}") from err
    if head.commonweight_recording != FORMAT:
        raise UsageError(
            f"{path} has format {head.commonweight_recording}; this version reads {FORMAT}",
            "pip install --upgrade commonweight",
        )
    return head, _lines(file, path)


def _lines(file: IO[bytes], path: Path) -> Iterator[Line]:
    with file:
        last = 0.0
        while True:
            try:
                text = file.readline(MAX_LINE_BYTES)
            except (zstd.ZstdError, EOFError):  # cut off: the lines before it are good
                return
            if not text.endswith(b"\n"):
                return
            try:
                line = _line.decode(text)
            except MALFORMED as err:
                raise UsageError(f"{path} is damaged after {last:.0f} s: {err}") from err
            if line.t < last:  # a clock was set back
                line = msgspec.structs.replace(line, t=last)
            last = line.t
            yield line


class RecordingSource:
    """A Source that records what another one gives."""

    def __init__(self, source: Source, recorder: Recorder) -> None:
        self._source, self._recorder = source, recorder
        self.ask = source.ask

    async def snapshot(self) -> Fleet:
        fleet = await self._source.snapshot()
        self._recorder.snapshot(fleet)
        return fleet

    async def messages(self) -> AsyncIterator[Envelope]:
        async for envelope in self._source.messages():
            self._recorder.message(envelope)
            yield envelope
