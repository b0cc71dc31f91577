"""Pictures of the monitor, stored in `pictures/` as text, followed by the styles.

    PICTURES=write pytest tests/coordinator/monitor/tui/test_pictures.py     # after looking at what
    changed PICTURES=svg pytest …                                            # into build/pictures,
    to look

One app is run for many pictures: starting it costs more than all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len
from textual.pilot import Pilot

from coordinator.monitor.tui.app import MonitorApp
from tests.support.scene import screen_text

FOLDER = Path(__file__).with_name("pictures")
TO_LOOK_AT = Path("build/pictures")
SIZES = ((60, 20), (80, 24), (140, 40))


def picture(app: MonitorApp) -> str:
    """The lines of the screen, its numbered styles, and the length of each style by line."""
    lines, runs, styles = [], [], dict[str, int]()
    for strip in app.screen._compositor.render_strips():
        lines.append(strip.text.rstrip())
        named = [(str(part.style or "none"), cell_len(part.text)) for part in strip]
        of_line = []
        for style, parts in groupby(named, key=lambda part: part[0]):
            number = styles.setdefault(style, len(styles))
            of_line.append(f"{number}×{sum(wide for _, wide in parts)}")
        runs.append(" ".join(of_line))
    legend = [f"{number} {style}" for style, number in styles.items()]
    return "\n".join([*lines, "", *legend, "", *runs, ""])


class Album:
    """Takes pictures, and reports at the end which have changed."""

    def __init__(self) -> None:
        self._mode = os.environ.get("PICTURES", "")
        self._others: list[str] = []

    def take(self, app: MonitorApp, name: str) -> None:
        """Take a picture of the screen."""
        kept, now = FOLDER / f"{name}.txt", picture(app)
        if self._mode == "write":
            FOLDER.mkdir(exist_ok=True)
            kept.write_text(now, encoding="utf-8")
        elif self._mode == "svg":
            TO_LOOK_AT.mkdir(parents=True, exist_ok=True)
            (TO_LOOK_AT / f"{name}.svg").write_text(app.export_screenshot(title=name))
        elif not kept.exists() or kept.read_text(encoding="utf-8") != now:
            self._others.append(f"{name} is now:\n{now}")

    def check(self) -> None:
        """Fail if any picture differs from the stored one."""
        assert not self._others, "\n".join(self._others)


async def still(pilot: Pilot[None]) -> None:
    """Draw everything, and wait until the screen no longer changes."""
    app = pilot.app
    assert isinstance(app, MonitorApp)
    await pilot.pause()
    app._draw(None)
    app.messages.clear()  # they pass with the time
    app._draw_message()
    before = ""
    for _ in range(20):
        await pilot.pause()
        if (now := screen_text(app)) == before:
            return
        before = now


async def tour(
    pilot: Pilot[None],
    album: Album,
    label: str,
    shows: Mapping[str, Sequence[str]],
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> None:
    """For every size and each of `shows`: press its keys, take a picture, and go back."""
    app = pilot.app
    assert isinstance(app, MonitorApp)
    for width, height in sizes:
        await pilot.resize_terminal(width, height)
        for name, keys in shows.items():
            await pilot.press(*keys)
            await still(pilot)
            album.take(app, f"{label}-{name}-{width}x{height}")
            while len(app.screen_stack) > 1:
                await pilot.press("escape")
            if app.page != "fleet":
                await pilot.press("1")
            if keys:
                await pilot.press("escape", "home")
