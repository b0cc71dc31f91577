"""The monitor of a recording: the same screens, and keys for the playback."""

from __future__ import annotations

from typing import ClassVar

from coordinator.monitor.tui.app import MonitorApp
from coordinator.monitor.tui.config import Config
from coordinator.remote.replay import ReplaySource


class ReplayApp(MonitorApp):
    """`commonweight monitor --replay FILE`; always read-only."""

    replaying: ClassVar[bool] = True

    def __init__(
        self, source: ReplaySource, *, config: Config | None = None, ascii_only: bool = False
    ) -> None:
        self._recording = source
        super().__init__(
            source, read_only=True, config=config, ascii_only=ascii_only, clock=source.clock
        )
        source.on_jump = self.following.reconnect

    @property
    def playback(self) -> str:
        return self._recording.status_text

    def action_play(self) -> None:
        self._recording.play()
        self._draw_frame(self._clock())

    def action_step(self) -> None:
        self._recording.step()

    def action_seek(self, by_s: float) -> None:
        self._recording.seek(by_s)
        self._events_seen = None  # skipped events get no message
        self.messages.clear()  # those of another time
        self._draw_frame(self._clock())

    def action_pace(self, factor: float) -> None:
        self._recording.pace(factor)
        self._draw_frame(self._clock())
