"""Results as a table, as `bench-results.json`, and as two plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.speed import codecs, ours, stock
from benchmarks.speed.cases import MB, Case
from benchmarks.speed.figures import Figures
from benchmarks.speed.floor import Floor

RESULTS = "bench-results.json"
_DOCS = Path(__file__).resolve().parents[2] / "docs" / "bench"
_ABOUT = {
    "ours": "TLS 1.3 and signatures on; coordinator and agents as processes; rounds as "
    "`run show` tells them: training and federated evaluation",
    "stock": "flower-superlink, flower-supernode, flwr run; --insecure (no TLS, no node "
    "authentication); rounds timed inside the ServerApp, training and evaluation",
    "ours_peak_rss_bytes": "the coordinator without its broker child",
    "stock_peak_rss_bytes": "SuperLink and ServerApp, the two that hold the model",
    "bytes": "ours: weights on the lane, headers of the files in; *_wire: a round through a "
    "counting relay, HTTP and TLS in, MQTT not",
    "nominal_bytes": "the size that the name says; model_bytes: the whole KB that were sent",
    "codecs": "see benchmarks/speed/codecs.py; GB/s of float32 input, one core, in memory",
    "training": "examples a second through the trainer's process, request to synced update, beside "
    "the loop alone of bare PyTorch; also by CPU time, which other programs do not slow",
    "floor": "wire, hash, mean and disk one after the other; see benchmarks/speed/floor.py",
}


def machine() -> dict[str, Any]:
    """What the results depend on, without the name of the machine."""
    return {
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "flwr": version("flwr"),
        "commonweight": version("commonweight"),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def row(
    case: Case,
    own: Figures,
    theirs: Figures | None,
    least: Floor,
    wire: tuple[Figures, Figures] | None,
) -> dict[str, Any]:
    """One case for the results file."""
    peak = sum(own.peak_rss_bytes[kind] for kind in ours.SERVER)
    found: dict[str, Any] = {
        "name": case.name,
        "agents": case.agents,
        "nominal_bytes": case.nominal_bytes,
        "model_bytes": case.model_bytes,
        "ours_s": own.median_s,
        "stock_s": theirs.median_s if theirs else None,
        "floor_s": least.total_s,
        "floor_parts_s": least._asdict(),
        "ratio_stock": theirs.median_s / own.median_s if theirs else None,
        "ratio_floor": own.median_s / least.total_s,
        "ours_rounds_s": own.seconds,
        "stock_rounds_s": theirs.seconds if theirs else [],
        "ours_cpu_s_per_round": own.cpu_s_per_round,
        "stock_cpu_s_per_round": theirs.cpu_s_per_round if theirs else None,
        "ours_peak_rss_bytes": peak,
        "ours_peak_by_process_bytes": own.peak_rss_bytes,
        "ours_peak_over_model": peak / case.model_bytes,
        "ours_bytes_up": own.bytes_up,
        "ours_bytes_down": own.bytes_down,
    }
    if theirs:
        found["stock_peak_rss_bytes"] = sum(
            theirs.peak_rss_bytes.get(kind, 0) for kind in stock.SERVER
        )
        found["stock_peak_by_process_bytes"] = theirs.peak_rss_bytes
        found["stock_idle_by_process_bytes"] = theirs.resting_rss_bytes
    if wire:
        for name, figures in zip(("ours", "stock"), wire, strict=True):
            found[f"{name}_bytes_up_wire"] = figures.bytes_up
            found[f"{name}_bytes_down_wire"] = figures.bytes_down
    return found


def write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": _ABOUT} | results, indent=1, ensure_ascii=False)
    (folder / RESULTS).write_text(text + "\n")


def keep(name: str, results: dict[str, Any]) -> None:
    """Write the results of a benchmark with a command of its own to docs/bench, for make figures;
    keys that are missing stay as they are."""
    whole = kept(name) | {"about": "as measured", "machine": machine()} | results
    _file(name).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def kept(name: str) -> dict[str, Any]:
    """The results of such a benchmark; empty if there are none."""
    file = _file(name)
    return json.loads(file.read_bytes()) if file.exists() else {}


def _file(name: str) -> Path:
    return _DOCS / f"{name}-results.json"


def show(results: dict[str, Any]) -> None:
    """The tables, on stdout."""
    console = Console(width=max(180, Console().width))
    console.print(_cases(results["cases"]))
    for title, rows in (
        ("Many agents", _loads),
        ("At rest", _idle),
        ("Codecs", _codecs),
        ("Training", _training),
    ):
        if lines := rows(results):
            table = Table("", *lines.pop(0), title=title, box=None, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)


def _cases(rows: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "Case": lambda r: r["name"],
        "ours": lambda r: f"{r['ours_s']:.3f} s",
        "stock": lambda r: _or_dash(r["stock_s"], "{:.2f} s"),
        "faster": lambda r: _or_dash(r["ratio_stock"], "{:.0f}×"),
        "floor": lambda r: f"{r['floor_s']:.3f} s",
        "wire+hash+mean+disk": lambda r: " ".join(f"{s:.3f}" for s in r["floor_parts_s"].values()),
        "÷ floor": lambda r: f"{r['ratio_floor']:.1f}",
        "CPU s coord. agents": lambda r: _our_cpu(r["ours_cpu_s_per_round"]),
        "stock CPU s": lambda r: _or_dash((r["stock_cpu_s_per_round"] or {}).get("all"), "{:.1f}"),
        "coord. MB": lambda r: f"{r['ours_peak_rss_bytes'] / MB:.0f}",
        "÷ model": lambda r: f"{r['ours_peak_over_model']:.1f}",
        "stock MB": lambda r: _megabytes(r.get("stock_peak_rss_bytes")),
        "agent": lambda r: _megabytes(r["ours_peak_by_process_bytes"].get("agent")),
        "trainer": lambda r: _megabytes(r["ours_peak_by_process_bytes"].get("trainer")),
        "MB up down": lambda r: f"{r['ours_bytes_up'] / MB:.2f} {r['ours_bytes_down'] / MB:.2f}",
    }
    table = Table(title="Seconds a round (median), CPU seconds a round, peak memory", box=None)
    for name in columns:
        table.add_column(name, justify="left" if name == "Case" else "right", no_wrap=True)
    for found in rows:
        table.add_row(*(column(found) for column in columns.values()))
    return table


def _our_cpu(cpu: dict[str, float]) -> str:
    server = cpu["coordinator"] + cpu["broker"]
    return f"{server:.3f} {cpu['agent'] + cpu['trainer']:.3f}"


def _loads(results: dict[str, Any]) -> list[list[str]]:
    if not results.get("load"):
        return []
    lines = [
        [
            *("in rounds", "round", "CPU s", "presence p50", "p99", "in rounds p99"),
            *("refusals", "coord. MB", "broker MB", "CPU % at rest"),
        ]
    ]
    for found in results["load"]:
        burst, busy = found["presence_burst"], found["presence_in_rounds"]
        lines.append(
            [
                f"{found['present']} present",
                str(found["working"]),
                _or_dash(found["round_s"], "{:.2f} s"),
                f"{found['coordinator_cpu_s_per_round']:.2f}",
                f"{burst['p50_s']:.2f} s",
                f"{burst['p99_s']:.2f} s",
                f"{busy['p99_s']:.2f} s",
                str(sum(found["refusals"].values()) + found["refused_updates"]),
                _megabytes(found["coordinator_peak_rss_bytes"]),
                _megabytes(found["broker_peak_rss_bytes"]),
                f"{found['resting_coordinator_cpu_percent']:.1f}",
            ]
        )
    return lines


def _codecs(results: dict[str, Any]) -> list[list[str]]:
    return codecs.lines(results["codecs"]) if results.get("codecs") else []


def _training(results: dict[str, Any]) -> list[list[str]]:
    if not results.get("training"):
        return []
    lines = [["examples/s", "bare loop", "ours ÷ bare", "by CPU time"]]
    for found in results["training"]:
        lines.append(
            [
                f"mnist {found['model']}, batch {found['batch']}",
                f"{found['ours_examples_per_s']:.0f}",
                f"{found['bare_examples_per_s']:.0f}",
                f"{found['ratio']:.2f}",
                f"{found['ratio_cpu']:.2f}",
            ]
        )
    return lines


def _idle(results: dict[str, Any]) -> list[list[str]]:
    if not (found := results.get("idle")):
        return []
    lines = [["MB", "CPU % of a core"]]
    for kind in ("coordinator", "broker", "agent"):
        memory, cpu = found[f"{kind}_rss_bytes"], found[f"{kind}_cpu_percent"]
        lines.append([kind, _megabytes(memory), f"{cpu:.2f}"])
    return lines


def _megabytes(nbytes: float | None) -> str:
    return _or_dash(nbytes / MB if nbytes else None, "{:.0f}")


def _or_dash(number: float | None, form: str) -> str:
    return "–" if number is None else form.format(number)


# --- plots -----------------------------------------------------------------------------------


def plot(folder: Path, results: dict[str, Any]) -> None:
    """`time-agents.svg` and `time-megabytes.svg`, from the cases that vary one of the two."""
    cases = results["cases"]
    small = [found for found in cases if found["model_bytes"] < MB]
    large = [found for found in cases if 10 * MB < found["model_bytes"] < 100 * MB]
    groups = [("10 KB", small, "-"), ("40 MB", large, "--")]
    _plot(folder / "time-agents.svg", "agents", lambda found: found["agents"], groups)
    pairs = [("2 agents", [found for found in cases if found["agents"] == 2], "-")]
    _plot(
        folder / "time-megabytes.svg",
        "model, MB",
        lambda found: found["model_bytes"] / MB,
        pairs,
    )


def _plot(
    file: Path,
    label: str,
    across: Callable[[dict[str, Any]], float],
    groups: list[tuple[str, list[dict[str, Any]], str]],
) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "commonweight", "font.size": 9}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
        for who, color in (("stock", "#9a9a9a"), ("ours", "#1f6f8b"), ("floor", "#d08a2e")):
            for group, rows, line in groups:
                points = sorted(
                    (across(found), found[f"{who}_s"]) for found in rows if found[f"{who}_s"]
                )
                if points:
                    axes.plot(*zip(*points, strict=True), line, color=color, marker="o", ms=3)
                    x, y = points[-1]
                    text = f" {who} {group}" if len(groups) > 1 else f" {who}"
                    axes.annotate(text, (x, y), color=color, fontsize=8, va="bottom")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a round")
        axes.margins(x=0.25)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.grid(True, which="major", lw=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"Time a round against {label}, loopback", fontsize=9, loc="left")
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
