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
    yield (
        "\nAll options of `commonweight run start` and of the form behind `n` in the monitor."
        " [Training runs](training.md) says which to choose."
    )
    yield "\n| option | meaning | default | allowed | unit |\n|---|---|---|---|---|"
    for option in OPTIONS:
        default = f"`{option.default_text}`" if option.default_text else ""
        cells = (f"`--{option.name}`", option.help, default, option.limits, option.unit)
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
