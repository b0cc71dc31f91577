"""A real Mosquitto, over files that the coordinator's command has written."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.transport.mosquitto import find_program
from tests.support.waiting import wait_for

needs_mosquitto = pytest.mark.skipif(
    shutil.which(find_program()) is None,
    reason="Mosquitto is not on this machine (make cluster-setup)",
)


class Mosquitto:
    """Mosquitto with this configuration. Its output is in a file beside it."""

    def __init__(self, config: Path) -> None:
        self._config, self._output = config, config.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._output.read_text(errors="replace")

    def start(self) -> None:
        """Start it, and wait until it listens."""
        said = self._output.stat().st_size if self._output.exists() else 0
        with self._output.open("ab") as log:
            self.process = subprocess.Popen(
                [find_program(), "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def runs() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            return " running" in self.log[said:]

        wait_for(runs, "Mosquitto runs")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL, which is like a power cut."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)


@contextmanager
def mosquitto(config: Path) -> Iterator[Mosquitto]:
    """Mosquitto, which runs, and ends with the block."""
    broker = Mosquitto(config)
    try:
        broker.start()
        yield broker
    finally:
        broker.close()
