"""The tables of docs/benchmarks.md and of the README, from the results of a full run."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.cases import MB

_HEAD = (
    "| model × agents | a round | stock Flower | times faster | ÷ physical limit | coordinator |\n"
    "|---|---|---|---|---|---|\n"
)
_SHORT_HEAD = (
    "| model × agents | round | Flower | coordinator memory | Flower |\n|---|---|---|---|---|\n"
)
#: The cases in the README's table, from those measured beside stock Flower.
_SHORT = ("10 KB × 2", "40 MB × 4", "400 MB × 2")


def table(results: dict[str, Any]) -> str:
    """The cases as a table, the many agents and the machine as a sentence."""
    rows = "".join(map(_row, results["cases"]))
    machine = results["machine"]
    sentences = [
        f"{machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}."
    ]
    sentences += [
        f"With {found['present']:,} agents present and {found['working']:,} of them in rounds, a "
        f"round takes {found['round_s']:.1f} s, and the coordinator knows of all agents within "
        f"{found['presence_burst']['p99_s']:.1f} s."
        for found in results.get("load", [])[-1:]
        if found["round_s"] is not None
    ]
    return f"{_HEAD}{rows}\n{' '.join(sentences)} `docs/bench/` has all figures.\n"


def _row(found: dict[str, Any]) -> str:
    stock, faster = found["stock_s"], found["ratio_stock"]
    cells = [
        found["name"],
        _seconds(found["ours_s"]),
        f"{stock:.1f} s" if stock else "–",
        f"{faster:.0f}" if faster else "–",
        f"{found['ratio_floor']:.1f}" if found["model_bytes"] > MB else "–",
        f"{found['ours_peak_rss_bytes'] / MB:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |\n"


def comparison(results: dict[str, Any]) -> str:
    """A few cases beside stock Flower: seconds per round, and memory of the server's processes."""
    rows = "".join(
        f"| {found['name']} | {_seconds(found['ours_s'])} | {_seconds(found['stock_s'])} "
        f"| {found['ours_peak_rss_bytes'] / MB:,.0f} MB "
        f"| {found['stock_peak_rss_bytes'] / MB:,.0f} MB |\n"
        for found in results["cases"]
        if found["name"] in _SHORT and found["stock_s"]
    )
    return _SHORT_HEAD + rows


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"
