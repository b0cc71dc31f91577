"""python -m benchmarks.speed.monitor_picture [--out docs/monitor.svg]

The first picture of the README: the real monitor at 140x40, watching the real demo. Starts a
coordinator and five agents with a few digits each, and saves the screen late in the run.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from benchmarks.speed.demo import AGENTS, ROUNDS, demo
from coordinator.fleet.reducer import current_run
from coordinator.fleet.state import Fleet
from coordinator.monitor.tui.app import MonitorApp
from coordinator.remote.api_client import LiveSource
from protocols.messages.states import PeerState, RunState

SIZE = (140, 40)


def is_telling(fleet: Fleet | None) -> bool:
    """True late in the run, while some peers train and others are done."""
    run = current_run(fleet) if fleet else None
    if fleet is None or run is None or len(run.rounds) < ROUNDS // 2:
        return False
    states = [peer.state for peer in fleet.peers.values()]
    training = states.count(PeerState.TRAINING)
    return run.changed.state is RunState.TRAINING and 2 <= training < AGENTS


async def picture(home: Path) -> str:
    """The screen as SVG. Raises RuntimeError if the run ended too early."""
    app = MonitorApp(LiveSource(home))
    async with app.run_test(size=SIZE) as pilot:
        while not is_telling(app.fleet):
            await pilot.pause(0.02)
            run = current_run(app.fleet) if app.fleet else None
            if run and len(run.rounds) == ROUNDS:
                raise RuntimeError("no moment was worth a picture: once again")
        app._draw(None)
        await pilot.pause()
        return app.export_screenshot(title="commonweight monitor")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    options.add_argument("--out", type=Path, default=Path("docs/monitor.svg"))
    chosen = options.parse_args()
    with demo() as shown:
        shown.join()
        shown.learn()
        chosen.out.write_text(asyncio.run(picture(shown.fleet.home)), encoding="utf-8")


if __name__ == "__main__":
    main()
