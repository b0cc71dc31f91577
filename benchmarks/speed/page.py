"""The README's table of figures, from the results of a full run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.speed.cases import MB

_BEGIN, _END = "<!-- figures of make bench -->\n", "<!-- end of figures -->\n"
_HEAD = (
    "| model × agents | a round | stock Flower | times faster | ÷ physical limit | coordinator |\n"
    "|---|---|---|---|---|---|\n"
)


def write(file: Path, results: dict[str, Any]) -> None:
    """Put the table where the file has its place. Raises ValueError if it has none."""
    text = file.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{file.name} has no place for the figures")
    file.write_text(before + begin + table(results) + end + after)


def table(results: dict[str, Any]) -> str:
    """The cases as a table, the many agents and the machine as a sentence."""
    rows = "".join(map(_row, results["cases"]))
    machine = results["machine"]
    words = [
        f"{machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}"
    ]
    words += [
        f"{found['present']:,} present, {found['working']:,} of them in rounds of "
        f"{found['round_s']:.1f} s: presence of all within {found['presence_burst']['p99_s']:.1f} s"
        for found in results.get("load", [])[-1:]
        if found["round_s"] is not None
    ]
    return f"{_HEAD}{rows}\n{'; '.join(words)}. `docs/bench/` has all figures.\n"


def _row(found: dict[str, Any]) -> str:
    stock, faster = found["stock_s"], found["ratio_stock"]
    cells = [
        found["name"],
        f"{found['ours_s']:.3f} s" if found["ours_s"] < 1 else f"{found['ours_s']:.1f} s",
        f"{stock:.1f} s" if stock else "–",
        f"{faster:.0f}" if faster else "–",
        f"{found['ratio_floor']:.1f}" if found["model_bytes"] > MB else "–",
        f"{found['ours_peak_rss_bytes'] / MB:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |\n"
