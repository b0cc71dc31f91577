"""Textual's driver for a browser: the screen goes to a pipe, the keys come from one."""

from __future__ import annotations

from textual.drivers.web_driver import WebDriver
from textual.messages import ExitApp


class PipeDriver(WebDriver):
    """Also ends the monitor when its input ends: the server that started it is gone then."""

    def run_input_thread(self) -> None:
        super().run_input_thread()
        if not self.exit_event.is_set():
            self.send_message(ExitApp())
