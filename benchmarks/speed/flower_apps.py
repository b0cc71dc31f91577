"""The seconds of a round of a Flower app that trains nothing: two agents, real processes.

    python -m benchmarks.speed.flower_apps

A round has two messages to each agent, of training and of evaluation, a version of a few bytes, and
a context that is kept.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import flwr

from tests.support import flower_apps
from tests.support.fleet_harness import fleet

ROUNDS, AGENTS = 30, ("north", "south")


def main() -> int:
    """Exit status 1 if the run did not finish."""
    app = str(flower_apps.FOLDER / "mean")
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as site:
        site.up()
        site.join(*AGENTS)
        for part, name in enumerate(AGENTS):
            site.ask_agent(name, "app", "add", app, "--part", f"{part}/{len(AGENTS)}")
        site.start(*AGENTS)
        words = ("--set", f"num-server-rounds={ROUNDS}", "--quorum", str(len(AGENTS)))
        run = site.ended_run(site.start_run("--flower", app, *words))
    seconds = sorted(closed["seconds"] for closed in run["history"])
    print(
        f"flwr {flwr.__version__}: {run['state']}, {len(seconds)} rounds, median "
        f"{statistics.median(seconds):.3f} s, longest {seconds[-1]:.3f} s"
    )
    return int(run["state"] != "finished")


if __name__ == "__main__":
    sys.exit(main())
