"""A TCP proxy that simulates network faults. It runs asyncio in a thread of its own.

    with Proxy(port) as proxy:      # listens on proxy.port, forwards to 127.0.0.1:port
        proxy.fault = Fault(delay_s=0.2)
        proxy.reset()

A fault applies to all later bytes, in existing and new connections.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

HOST = "127.0.0.1"
_PIECE_BYTES = 64 * 1024
_LOOK_S = 0.05
#: What is on a limited line at a time, and lost when it is cut: the bytes of this time.
_ON_LINE_S, _MIN_PIECE_BYTES = 0.05, 4 * 1024
#: SO_LINGER on, 0 s: close() sends a reset.
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What happens to bytes. By default they pass unchanged.

    `delay_s` (± `jitter_s`) delays each piece. `hold_up` and `hold_down` hold back the bytes of one
    direction and keep all connections open: both are a blackhole. `bytes_per_s` throttles each
    direction of each connection, `line_bytes_per_s` each direction of all connections together
    (down: `line_down_bytes_per_s`, unless it is 0). `cut_after` bytes up a connection is closed
    (`truncate`). `refuse` takes no connection. `drop` is the chance that a piece resets its
    connection: what loss beyond repair looks like to TCP. `drop_up_per_mb` is that chance for each
    MB up. A piece that is dropped counts as sent.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    hold_up: bool = False
    hold_down: bool = False
    bytes_per_s: float = 0.0
    line_bytes_per_s: float = 0.0
    line_down_bytes_per_s: float = 0.0
    cut_after: int = 0
    refuse: bool = False
    drop: float = 0.0
    drop_up_per_mb: float = 0.0


CLEAR = Fault()
BLACKHOLE = Fault(hold_up=True, hold_down=True)


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target` with the effects of `fault`."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self._target = target
        self._random = random.Random(seed)
        self.fault = CLEAR
        self.connections = self.drops = 0
        self.bytes_up = self.bytes_down = 0
        self._line_free_at = {True: 0.0, False: 0.0}  # by direction: up, down
        self._open: set[asyncio.StreamWriter] = set()
        self._unanswered: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self._call(self._loop.stop)
        self._thread.join(10)

    def reset(self) -> None:
        """Reset every connection that is open now."""
        self._call(self._reset_all)

    def hold_answers(self) -> None:
        """Hold back all bytes down of the connections that are open now; later ones are free."""
        self._call(lambda: self._unanswered.update(self._open))

    def _call(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    # --- in the thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket))
        self._loop.run_forever()
        server.close()
        self._reset_all()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _reset_all(self) -> None:
        for writer in list(self._open):
            self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._open.discard(writer)
        self._unanswered.discard(writer)
        sock = writer.get_extra_info("socket")
        if sock is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.fault.refuse:
            self._end(writer)
            return
        try:
            onward, out = await asyncio.open_connection(HOST, self._target)
        except OSError:
            self._end(writer)
            return
        self._open |= {writer, out}
        ways = (self._pass(reader, out, up=True), self._pass(onward, writer, up=False))
        tasks = [asyncio.create_task(way) for way in ways]
        # asyncio's streams would log the end of the proxy as a failure of this task.
        with suppress(asyncio.CancelledError):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self._end(writer)
        self._end(out)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        passed = 0
        with suppress(OSError):
            while piece := await reader.read(self._piece_bytes(up)):
                await self._wait(len(piece), up)
                while not up and writer in self._unanswered:  # noqa: ASYNC110 - by the other way
                    await asyncio.sleep(_LOOK_S)
                fault = self.fault
                chance = fault.drop + up * fault.drop_up_per_mb * len(piece) / 1e6
                if chance and self._random.random() < chance:
                    self.drops += 1
                    self.bytes_up += up * len(piece)
                    return
                if up and fault.cut_after and passed + len(piece) >= fault.cut_after:
                    last = piece[: max(0, fault.cut_after - passed)]
                    writer.write(last)
                    await writer.drain()
                    self.bytes_up += len(last)
                    return
                writer.write(piece)
                await writer.drain()
                passed += len(piece)
                if up:
                    self.bytes_up += len(piece)
                else:
                    self.bytes_down += len(piece)

    def _line_bytes_per_s(self, up: bool) -> float:
        down = self.fault.line_down_bytes_per_s
        return down if down and not up else self.fault.line_bytes_per_s

    def _piece_bytes(self, up: bool) -> int:
        if not (rate := self._line_bytes_per_s(up)):
            return _PIECE_BYTES
        return min(_PIECE_BYTES, max(_MIN_PIECE_BYTES, int(rate * _ON_LINE_S)))

    async def _wait(self, nbytes: int, up: bool) -> None:
        """Wait as long as the fault delays this piece."""
        fault = self.fault
        wait_s = fault.delay_s + self._random.uniform(-fault.jitter_s, fault.jitter_s)
        if fault.bytes_per_s:
            wait_s += nbytes / fault.bytes_per_s
        if line_bytes_per_s := self._line_bytes_per_s(up):
            now = asyncio.get_running_loop().time()
            free_at = max(now, self._line_free_at[up]) + nbytes / line_bytes_per_s
            self._line_free_at[up] = free_at
            wait_s += self._line_free_at[up] - now
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        while self.fault.hold_up if up else self.fault.hold_down:  # noqa: ASYNC110 - by a thread
            await asyncio.sleep(_LOOK_S)
