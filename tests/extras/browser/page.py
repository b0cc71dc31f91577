"""The page as a test sees and uses it: the text of the terminal, keys, clicks, pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psutil
from playwright.sync_api import BrowserContext, Error, Page

from tests.support.fleet_harness import ROOT, Program, descendants
from tests.support.waiting import wait_for

#: For looking at what the tests have seen.
PICTURES = ROOT / "build" / "browser"
SIZE = {"width": 1400, "height": 860}
#: Keeps the object of textual.js that has the terminal: the text is drawn on a canvas.
CAPTURE = """
Object.defineProperty(Object.prototype, "websocket_url", {
  configurable: true,
  set(url) {
    window.shown = this;
    Object.defineProperty(this, "websocket_url", { value: url, writable: true });
  },
});
"""
LINES = """() => {
  const terminal = window.shown?.terminal;
  const lines = [...Array(terminal?.rows ?? 0).keys()];
  const text = (y) => terminal.buffer.active.getLine(y).translateToString(true, 0, terminal.cols);
  return lines.map(text);
}"""


class Tab:
    """A tab of the browser that shows the monitor."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.add_init_script(CAPTURE)

    @property
    def lines(self) -> list[str]:
        """What the terminal shows; empty before it is there, and while the page is replaced."""
        try:
            lines: list[str] = self.page.evaluate(LINES)
        except Error:
            return []
        return lines

    @property
    def columns(self) -> int:
        columns: int = self.page.evaluate("window.shown.terminal.cols")
        return columns

    def until(self, *words: str, without: str = "\0") -> None:
        """Wait until the terminal shows each of the words, and not `without`."""

        def shown() -> bool:
            text = "\n".join(self.lines)
            return all(word in text for word in words) and without not in text

        try:
            wait_for(shown, within_s=60)
        except AssertionError:
            raise AssertionError("\n".join([f"not shown: {words}", *self.lines])) from None

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def spot(self, word: str) -> tuple[float, float]:
        """Where the word is on the page, in pixels."""
        row, line = next((row, line) for row, line in enumerate(self.lines) if word in line)
        box = self.page.locator(".xterm-screen").bounding_box()
        assert box is not None
        column = line.index(word) + 0.5
        x = box["x"] + column * box["width"] / self.columns
        return x, box["y"] + (row + 0.5) * box["height"] / len(self.lines)

    def click(self, word: str) -> None:
        self.page.mouse.click(*self.spot(word))

    def take_picture(self, name: str) -> bytes:
        PICTURES.mkdir(parents=True, exist_ok=True)
        return self.page.screenshot(path=PICTURES / f"{name}.png")


class Served:
    """A running `commonweight monitor --serve`, and the tabs that show it."""

    def __init__(self, program: Program, new_context: Callable[..., BrowserContext]) -> None:
        self.program, self._new_context = program, new_context

        def printed() -> Any:
            assert program.process.poll() is None, program.log
            return re.search(r"open: ((http://\S+:\d+)/\?token=(\S+))\n", program.log)

        self.address, self.base, self.token = wait_for(printed, "the address").groups()

    @property
    def processes(self) -> list[psutil.Process]:
        """The monitors of the open tabs."""
        return descendants(self.program.process.pid)

    def context(self, **options: Any) -> BrowserContext:
        """A new profile of the browser: nothing is shared with others."""
        return self._new_context(self.base, **options)

    def open(self, context: BrowserContext | None = None, **options: Any) -> Tab:
        """A tab with the printed address."""
        tab = Tab((context or self.context(**options)).new_page())
        tab.page.goto(self.address)
        return tab
