"""The docs' table of run options: python deploy/run_options.py > docs/run-options.md"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from coordinator.runs.options import OPTIONS  # noqa: E402


def page() -> Iterator[str]:
    """The page's lines."""
    yield "# Run options"
    yield "\n`commonweight run start` and the form behind `n` in the monitor take these options."
    yield "\n| option | default | allowed | unit | |\n|---|---|---|---|---|"
    for option in OPTIONS:
        default = f"`{option.default_text}`" if option.default_text else ""
        cells = (f"`--{option.name}`", default, option.limits, option.unit, option.help)
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
