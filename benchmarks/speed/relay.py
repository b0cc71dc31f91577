"""A TCP relay on loopback that counts the bytes of both directions."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.support.fleet_harness import HOST


class Relay:
    """Listens on `port` and passes everything on to `target`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._up = self._down = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def counted(self) -> tuple[int, int]:
        """Bytes towards the target so far, and back."""
        with self._lock:
            return self._up, self._down

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._target))
                for source, sink, up in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self._pass_on, args=(source, sink, up), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 18):
                sink.sendall(piece)
                with self._lock:
                    if up:
                        self._up += len(piece)
                    else:
                        self._down += len(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
