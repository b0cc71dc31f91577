"""Tables of the docs from the results of the benchmarks with a command of their own."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.speed import floors

_TRAINING = {("2nn", 10): "2NN, 10", ("2nn", 100): "2NN, 100", ("cnn", 10): "CNN, 10"}
_JOBS = {
    "four peers": "four peers, one of them 10 × slower",
    "one killed": "the same, and one killed on the way",
    "one process": "one process",
    "Pool(2)": "`multiprocessing.Pool(2)`",
    "Dask, 2 workers": "a local Dask cluster, 2 workers",
}


def training(results: dict[str, Any]) -> str:
    """Examples per second through the agent, and of a bare loop: bench-results.json."""
    lines = "".join(
        f"| {_TRAINING[row['model'], row['batch']]} | {row['ours_examples_per_s']:,.0f} "
        f"| {row['bare_examples_per_s']:,.0f} |\n"
        for row in results["training"]
    )
    return f"| model, batch | through the agent | bare PyTorch loop |\n|---|---|---|\n{lines}"


def load(results: dict[str, Any]) -> str:
    """What many agents cost the coordinator: bench-results.json."""
    lines = "".join(
        f"| {row['present']:,} | {row['resting_coordinator_rss_bytes'] / 1e6:.0f} MB "
        f"| {row['resting_coordinator_cpu_percent']:.0f} % | {row['working']:,} "
        f"| {row['round_s']:.1f} s | {row['coordinator_cpu_s_per_round']:.1f} s |\n"
        for row in results["load"]
    )
    head = "| agents present | memory | at rest, of a core | agents in a round | a round | CPU |\n"
    return f"{head}|---|---|---|---|---|---|\n{lines}"


def egress(results: dict[str, Any]) -> str:
    """Time until all peers have a version, and the copies that leave: egress-results.json."""
    lines = ""
    for row in (*results["rows"], results["slow"]):
        lines += (
            f"| {row['peers']} | {row['model_bytes'] / 1e6:.0f} MB, {row['line_mbit_s']:g} Mbit/s "
            f"| {row['alone_s']:.1f} s, {row['alone_egress']:.1f} copies "
            f"| {row['shared_s']:.1f} s, {row['shared_egress']:.1f} copies |\n"
        )
    head = "| peers | version, coordinator's line | from the coordinator only | with sharing |\n"
    return f"{head}|---|---|---|---|\n{lines}"


def jobs(results: dict[str, Any]) -> str:
    """Seconds of each way, by table: jobs-results.json."""
    digits, numbers = (
        next(row for row in results["rows"] if row["table"] == name)["seconds"]
        for name in ("MNIST-5k", "synthetic")
    )
    lines = "".join(
        f"| {name} | {digits[key]:.2g} | {numbers[key]:.2g} |\n" for key, name in _JOBS.items()
    )
    return f"| | 5,000 digits | 1,000,000 rows of 10 numbers |\n|---|---|---|\n{lines}"


def serve(results: dict[str, Any]) -> str:
    """Requests and latencies: serve-results.json."""
    lines = ""
    for row in results["rows"]:
        busy = row.get("while a run trains")
        found = busy or row
        name = f"{found['clients']} client{'s' * (found['clients'] > 1)}"
        if busy:
            name += f", while a run trained here and {row['swaps']} new versions took over"
        lines += (
            f"| {name} | {found['requests_per_s']} | {found['p50_ms']:.1f} ms "
            f"| {found['p99_ms']:.1f} ms | {found['failed']} |\n"
        )
    head = "| `serve` on one core, one digit of 784 columns per request | requests/s | p50 | p99 "
    return f"{head}| failed |\n|---|---|---|---|---|\n{lines}"


def monitor(results: dict[str, Any]) -> str:
    """The monitor under load, for 500 and 2,000 peers: monitor-results.json."""
    shown: dict[str, list[str]] = {
        "a frame, median (p95)": [],
        "from a key to the screen, median (p95)": [],
        "share of one core, memory": [],
        "memory after every page and key, and ten minutes later": [],
    }
    for row, later in zip(results["rows"], results["memory"], strict=True):
        assert row["peers"] == later["peers"]
        cells = (
            f"{row['frame_median_ms']:.0f} ms ({row['frame_p95_ms']:.0f})",
            f"{row['key_p50_ms']:.0f} ms ({row['key_p95_ms']:.0f})",
            f"{row['cpu_percent']} %, {row['memory_mb']} MB",
            f"{later['rss_mb_first_quarter']:.0f}, then {later['rss_mb_last_quarter']:.0f} MB",
        )
        for cell, cells_of in zip(cells, shown.values(), strict=True):
            cells_of.append(cell)
    peers = " | ".join(f"{row['peers']:,} peers" for row in results["rows"])
    lines = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in shown.items())
    return f"| monitor at 140×40, 1,000 messages a second | {peers} |\n|---|---|---|\n{lines}"


def stragglers(results: dict[str, Any]) -> str:
    """Time until 90 %, by mode: stragglers-results.json."""
    virtual, real = results["virtual"], results["real"]
    whole = _mean(virtual["synchronous"], "time")
    whole_s = real["synchronous"]["rounds_s"]
    lines = ""
    for mode, rows in virtual.items():
        name = "rounds" if mode == "synchronous" else mode
        time, uploads = _mean(rows, "time"), _mean(rows, "uploads")
        cells = [f"{time:.1f}{_beside(time, whole)}", f"{uploads:.1f}", "", ""]
        if found := real.get(mode):
            taken = f"{found['rounds_s']:.1f}{_beside(found['rounds_s'], whole_s)}"
            cells[2:] = [
                f"{taken}; {found['wall_s']:.1f} with start and end",
                str(found["uploads"]),
            ]
        lines += f"| {name} | {' | '.join(cells)} |\n".replace("|  ", "| ")
    head = "| mode | virtual time, 3 seeds | uploads | processes, s, one run | uploads |\n"
    return f"{head}|---|---|---|---|---|\n{lines}"


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _beside(value: float, whole: float) -> str:
    return "" if value == whole else f" (1/{whole / value:.0f})"


_OPTIONS = {"fold": "`--late fold`", "buffered": "`--mode buffered`"}


def overlap(results: dict[str, Any]) -> str:
    """The share of the time in which peers train: overlap-results.json."""
    lines = "".join(
        f"| {row['up_mbit']:g}, {row['down_mbit']:g} | `{row['codec']}` | {row['bytes_up']:,} "
        f"| {row['bytes_down']:,} | {row.get('fragments', 1)} | {row['steps']} "
        f"| {row['waiting']:.0%} | {row['overlapped']:.0%} |\n"
        for row in results["rows"]
    )
    head = (
        "| Mbit/s up, down | codec | bytes up | bytes down | fragments | steps | without | with |"
    )
    return f"{head}\n|---|---|---|---|---|---|---|---|\n{lines}".replace("%", " %")


def limits(results: dict[str, Any]) -> str:
    """Rounds beside the physical limit: floors-results.json."""
    lines = "".join(
        f"| {row['name']} | {row['round_s']:.2f} s | {row['cpu_s']:.2f} s "
        f"| {' to '.join(dict.fromkeys(f'{limit:.2f}' for limit in sorted(row['limits_s'])))} s "
        f"| {floors.ratios(row)} | {floors.GOALS[row['name']]} |\n"
        for row in results["rows"]
    )
    head = "| model × agents | a round | its processor time | physical limit | times the limit "
    return f"{head}| goal |\n|---|---|---|---|---|---|\n{lines}"


def processor_time(results: dict[str, Any]) -> str:
    """What the processor time of a round is spent on: floors-results.json."""
    lines = "".join(
        f"| {part['what']} | {part['cpu_s']:.2f} s | {part['limit']} |\n"
        for part in results["processor_time"]
    )
    return f"| work | processor time | the physical limit has |\n|---|---|---|\n{lines}"


def late_training(results: dict[str, Any]) -> str:
    """The loss that a late version costs: overlap-results.json."""
    rows = results["losses"]
    lines = "".join(
        f"| {row['overlap']} | {row['fragments']} | {row['inner']} | {row['steps']} "
        f"| {row['loss']:.3f} | {row['loss'] / rows[0]['loss'] - 1:+.1%} |\n"
        for row in rows
    )
    head = "| `--overlap` | `--fragments` | steps a round | steps | held-out loss | |\n"
    return f"{head}|---|---|---|---|---|---|\n{lines}".replace("%", " %").replace("+0.0 %", "")


def slow_lines(results: dict[str, Any]) -> str:
    """What became of the updates of peers behind slow lines: slow-lines-results.json."""
    lines = "".join(
        f"| {row['megabytes']:.0f} MB | {_OPTIONS[row['mode']]} "
        f"| {'restarted' if peer['killed'] else ''} "
        f"| {row['versions']} | {row['longest_s']:.0f} s | {peer['updates']} "
        f"| {peer['versions_behind']} | {peer['cuts']} | {peer['sent_twice']:.1%} |\n"
        for row in results["rows"]
        for peer in row["peers"].values()
    )
    head = (
        "| an update | | agent | versions | longest wait for one | its updates that counted "
        "| versions behind | cuts | sent in excess |\n"
    )
    return f"{head}|---|---|---|---|---|---|---|---|---|\n{lines}".replace("%", " %")
