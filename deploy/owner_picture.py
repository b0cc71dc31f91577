"""The picture of the owner's monitor: python deploy/owner_picture.py > docs/owner-monitor.svg

The real monitor draws a machine whose readings are made up: a real one would show the machine on
which the picture was made.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from agent.cli.monitor.app import OwnerMonitor  # noqa: E402
from agent.cli.monitor.readings import Machine  # noqa: E402
from agent.home.audit_log import AuditEntry  # noqa: E402
from agent.home.consent_requests import Request  # noqa: E402
from agent.home.privacy_ledger import Limit  # noqa: E402
from agent.home.settings_schema import AgentSettings  # noqa: E402
from agent.home.status_files import OwnerRequest, Status  # noqa: E402
from agent.policy.rules import Run, SensorReadings  # noqa: E402
from deploy.monitor_animation import Film, animation, elements  # noqa: E402

SIZE = (100, 34)
TITLE = "commonweight-agent monitor"
COMMAND = "python deploy/owner_picture.py > docs/owner-monitor.svg"
#: A Monday evening, local time.
NOW = time.mktime((2026, 11, 30, 19, 40, 0, 0, 334, -1))
RUN = "tabular-7dc222"


def machine() -> Machine:
    """A machine of a clinic that trains in the evening."""
    status = Status(
        pid=1,
        at=NOW,
        since=NOW - 6_300,
        peer="NORT-Q2WW-UHQW-W6BA",
        name="north-clinic",
        version="0.1.0",
        state="training",
        session=True,
        mqtt=True,
        run=RUN,
        round=12,
        rounds_done=11,
        bytes_up=8_800_000,
        bytes_down=9_600_000,
    )
    entries = [
        AuditEntry(
            at=NOW - 60 * (12 - number),
            run=RUN,
            task="tabular",
            round=number,
            what="weights",
            nbytes=800_000,
        )
        for number in range(5, 12)
    ]
    sensed = SensorReadings(
        minute=19 * 60 + 40,
        others_percent=9.0,
        user_idle_s=2_400.0,
        hottest_c=58.0,
        memory_free_percent=61.0,
        home_bytes=1_200_000_000,
        up_today_bytes=8_800_000,
        down_today_bytes=9_600_000,
    )
    return Machine(
        now=NOW,
        is_running=True,
        status=status,
        request=OwnerRequest(),
        chosen=AgentSettings(hours="mon-fri 18:00-08:00"),
        sensed=sensed,
        decision=Run(),
        cpu=tuple(22.0 + 50.0 * (second % 17 > 4) + second * 7 % 11 for second in range(120)),
        entries=tuple(entries),
        num_left=11,
        bytes_left=8_800_000,
        spent_epsilon=0.7,
        limit=Limit(2.0, 1e-6),
        consents=(Request(task="mnist", run="mnist-b18ed6", at=NOW),),
    )


async def screenshot() -> str:
    """The SVG of Textual."""
    shown = machine()
    app = OwnerMonitor(lambda: shown, lambda want: None)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        app.draw()
        await pilot.pause()
        await pilot.pause()
        return app.export_screenshot(title=TITLE)


def main() -> None:
    picture = elements(asyncio.run(screenshot()))
    sys.stdout.write(animation([picture], Film([1.0], SIZE, TITLE, COMMAND)))


if __name__ == "__main__":
    main()
