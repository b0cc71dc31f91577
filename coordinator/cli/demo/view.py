"""The output of a demo: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet, Run
from coordinator.monitor.plain_table import STYLES, plain_table
from coordinator.monitor.round_table import accuracy_trend, base_columns, best_round
from coordinator.remote.formatting import NOTHING, progress, trend

_BAR = 24


class DemoView:
    """Shows the steps and the fleet on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._num_shown = 0
        self._step = ""
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> DemoView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the terminal to another program."""
        if self._live is not None:
            self._live.stop()
        yield
        if self._live is not None:
            self._live.start()

    def step(self, words: str) -> None:
        """Show the present step of the demo."""
        self._step = words
        if self._live is None:
            self._console.print(words, highlight=False)
        else:
            self._live.update(Spinner("dots", words))

    def sample(self, round_: int, text: str) -> None:
        """Show what the model wrote after a round."""
        self._console.print(Text(f"round {round_} writes: {text}"), highlight=False)

    def fleet(self, fleet: Fleet) -> None:
        """Show the fleet; called a few times a second."""
        run = current_run(fleet)
        if self._live is not None:
            table = plain_table(fleet, time.time(), width=self._console.width)
            parts: list[RenderableType] = [table]
            parts.append(_run_line(run) if run and run.rounds else Spinner("dots", self._step))
            self._live.update(Group(*parts))
        elif run is not None:
            for closed in run.rounds[self._num_shown :]:
                cells = {one.title: one.cell(closed, 0.0, 0).text for one in base_columns(best=0)}
                self._console.print(
                    f"round {closed.round}/{run.changed.rounds}  accuracy {cells['Accuracy']}  "
                    f"loss {cells['Val loss']}  {closed.peers} peers  {cells['Time']}",
                    highlight=False,
                )
            self._num_shown = len(run.rounds)


def _run_line(run: Run) -> Text:
    done, of = len(run.rounds), run.changed.rounds
    last = run.rounds[-1].accuracy
    accuracy = NOTHING if last is None else f"{100 * last:.1f} %"
    line = Text(f"round {done}/{of} ")
    line.append(progress(done, of, _BAR), style="cyan")
    line.append(f"  accuracy {accuracy} ")
    line.append(trend(accuracy_trend(run.rounds), _BAR), style="green")
    return line


def rounds_table(run: Run) -> Table:
    """A table of all rounds; the best one has a star."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = base_columns(best_round(run))
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for closed in run.rounds:
        cells = [column.cell(closed, 0.0, 0) for column in columns]
        table.add_row(*(Text(cell.text, style=STYLES[cell.tone]) for cell in cells))
    return table
