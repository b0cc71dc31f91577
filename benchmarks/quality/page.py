"""The tables of docs/quality.md, docs/large-models.md and docs/privacy.md, from docs/quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

_CODECS_HEAD = (
    "| codec | split | seeds | accuracy at round 100 | best | rounds to 90 / 92 / 93 % | bytes up "
    "| known |\n|---|---|---|---|---|---|---|---|\n"
)
#: Codec, split, and what is known: the results that this table stands beside.
_CODECS = (
    ("fp32", "iid", ".949 ± .002; 3 / 6 / 9"),
    ("int8", "iid", "the same"),
    ("topk", "iid", ".946; 9 / 15 / 18"),
    ("fp32", "shards", "best .914–.924; 39–50"),
    ("int8", "shards", "the same"),
    ("sign", "shards", "best .910–.921; 55–59"),
    ("topk", "shards", "best .909–.916; 53–61"),
)
_ADAPTERS_HEAD = (
    "| `aggregation` | fall of the held-out loss, nats per token | kB up | kB down "
    "| missing of a round's change |\n|---|---|---|---|---|\n"
)
#: Relative to a round's change: below this, a version is the mean but for rounding to float32.
EXACT = 1e-5
_SPLITS = {"iid": "at random", "shards": "two labels per peer"}
_STRATEGIES_HEAD = (
    "| strategy | codec | seeds | best | rounds to 90 % | bytes up |\n|---|---|---|---|---|---|\n"
)
#: What the page calls a course with two labels per peer, and its codec.
_STRATEGIES = {
    "fp32, shards": "FedAvg | fp32",
    "scaffold, shards": "SCAFFOLD | fp32",
    "scaffold + ternary, shards": "SCAFFOLD, `option=3` | ternary",
    "scaffold + sign, shards": "SCAFFOLD, `option=3` | sign",
    "fedyogi, shards": "FedYogi, eta 0.01 | fp32",
    "fedavgm, shards": "FedAvgM, momentum 0.9, rate 0.3 | fp32",
    "fedadam, shards": "FedAdam, eta 0.01 | fp32",
    "fedprox, shards": "FedProx, mu 0.1 | fp32",
}
_CAMERAS_HEAD = (
    "| strategy | batch norm | accuracy at round 30 | best | rounds to 90 % |\n"
    "|---|---|---|---|---|\n"
)
_CAMERAS = {
    "fedavg, no norm, cameras": "FedAvg | no",
    "fedavg, cameras": "FedAvg | yes",
    "scaffold, cameras": "SCAFFOLD | yes",
    "fedbn, cameras": "FedBN, with each peer's own norms | yes",
}
_LYING_HEAD = "| strategy | nobody lies | turned | turned and fourfold |\n|---|---|---|---|\n"
_LYING = {
    "fedavg": "FedAvg",
    "fedtrimmedavg": "FedTrimmedAvg, beta 0.2",
    "fedmedian": "FedMedian",
    "multikrum": "MultiKrum, 2 malicious, 6 chosen",
}
_ONE_HEAD = (
    "| one of ten peers | at random, no limit | at random | two labels per peer |\n"
    "|---|---|---|---|\n"
)
#: What the page calls a lie.
_ONE = {
    "honest": "is honest",
    "sign flip": "turns the sign of its change",
    "hundredfold": "sends a hundred times its change",
    "random": "sends noise, ten times as long as its change",
    "constant": "sends 7.0 for every weight",
    "label flip": "trains on labels 9 - y",
    "a little": "sends the mean of the others less 1.5 deviations",
    "inflated count": "turns the sign, and claims a thousand times its examples",
    "at the limit": "turns the mean of the others, as far as the limit just allows",
    "false metrics": "praises the first version and blames the others: the version chosen as best",
}
_FEW_BYTES_HEAD = (
    "| exchange | optimizer | learning rate | held-out loss, by seed | bytes up | beside AdamW at "
    "every step | beside Muon at every step |\n|---|---|---|---|---|---|---|\n"
)

_LANGUAGE_HEAD = (
    "| method | learning rate | held-out loss, nats per token | bytes up | bytes both ways |\n"
    "|---|---|---|---|---|\n"
)


def codecs(results: dict[str, Any]) -> str:
    """Codecs beside known results."""
    lines = ""
    for codec, split, known in _CODECS:
        rows = _of(results, f"{codec}, {split}")
        reached = " / ".join(_round(rows, f"to_{percent}") for percent in (90, 92, 93))
        lines += (
            f"| {codec} | {_SPLITS[split]} | {len(rows)} | {_spread(_all(rows, 'end'))} "
            f"| {_spread(_all(rows, 'best'))} | {reached} "
            f"| {_share(results, rows, f'fp32, {split}')} | {known} |\n"
        )
    return _CODECS_HEAD + lines


def strategies(results: dict[str, Any]) -> str:
    """Strategies where each peer has two labels."""
    lines = ""
    for course, name in _STRATEGIES.items():
        rows = _of(results, course)
        lines += (
            f"| {name} | {len(rows)} | {_each(rows, 'best')} | {_each(rows, 'to_90')} "
            f"| {_share(results, rows, 'fp32, shards')} |\n"
        )
    return _STRATEGIES_HEAD + lines


def cameras(results: dict[str, Any]) -> str:
    """Strategies where each peer has another camera."""
    lines = ""
    for course, name in _CAMERAS.items():
        rows = _of(results, course)
        lines += (
            f"| {name} | {_spread(_all(rows, 'end'))} | {_mean(_all(rows, 'best'))} "
            f"| {_round(rows, 'to_90')} |\n"
        )
    new = _all(_of(results, "fedbn, cameras"), "newcomer")
    ends, best = [curve[-1] for curve in new], [max(curve) for curve in new]
    lines += f"| FedBN, as a new peer would have it | yes | {_spread(ends)} | {_mean(best)} | – |\n"
    return _CAMERAS_HEAD + lines


def lying(results: dict[str, Any]) -> str:
    """Strategies where two of ten peers lie: the accuracy at the end, and the best."""
    lines = ""
    for strategy, name in _LYING.items():
        cells = []
        for attack in ("nobody lies", "sign turned", "fourfold"):
            found = _of(results, f"{strategy}, {attack}")
            # Only FedAvg was trained without an attack, and it has no result with the last one.
            missing = "diverges" if attack == "fourfold" else ""
            cells.append(
                f"{_shown(found[0]['end'])}, {_shown(found[0]['best'])}" if found else missing
            )
        lines += f"| {name} | {' | '.join(cells)} |\n".replace("|  ", "| ")
    return _LYING_HEAD + lines


def one_liar(results: dict[str, Any]) -> str:
    """One lying peer of ten: points more or less than the fleet without that peer."""
    lines = ""
    for lie, name in _ONE.items():
        key = "chosen" if lie == "false metrics" else "end"
        cells = [
            _points(results, f"one of ten: {course}", split, key)
            for course, split in ((f"{lie}, no limit", "iid"), (lie, "iid"), (lie, "shards"))
        ]
        lines += f"| {name} | {' | '.join(cells)} |\n".replace("|  ", "| ")
    return _ONE_HEAD + lines


def points_of_one_liar(results: dict[str, Any], lie: str, split: str, key: str) -> list[float]:
    """By seed, how many points the accuracy is above that of the fleet without the liar."""
    without = {row["seed"]: row[key] for row in _of(results, f"one of ten: left out, {split}")}
    rows = _of(results, f"{lie}, {split}")
    return [100 * (row[key] - without[row["seed"]]) for row in rows]


def _points(results: dict[str, Any], lie: str, split: str, key: str) -> str:
    found = points_of_one_liar(results, lie, split, key)
    if not found:
        return ""
    ends = f" ({min(found):+.1f} to {max(found):+.1f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.1f}{ends}".replace("-", "−")


def language(results: dict[str, Any]) -> str:
    """DiLoCo beside an exchange at every step."""
    every = [row for row in results["rows"] if row["arm"] == "every-step"]
    rare = [row for row in results["rows"] if row["arm"] == "diloco"]
    lines = [
        _LANGUAGE_HEAD,
    ]
    for (optimiser, lr), mine in _grouped(every, "optimiser", "lr").items():
        lines.append(
            f"| gradients exchanged at every step{_named(optimiser)} | {lr} | {_losses(mine)} "
            "| 1 | 1 |\n"
        )
    for way, mine in _grouped(rare, "optimiser", "inner", "codec", "lr").items():
        optimiser, inner, codec, lr = way
        up, both = (statistics.mean(row[key] for row in mine) for key in ("fewer_up", "fewer"))
        lines.append(
            f"| DiLoCo, every {inner} steps, {codec}{_named(optimiser)} | {lr} | {_losses(mine)} "
            f"| 1/{up:.0f} | 1/{both:.0f} |\n"
        )
    return "".join(lines)


def few_bytes(results: dict[str, Any]) -> str:
    """Rare exchanges beside those at every step, each at its best learning rate, over the seeds
    that both have."""
    rows = [row for row in results["rows"] if row["arm"] in ("every-step", "diloco")]
    groups = _grouped(rows, "arm", "inner", "codec", "optimiser")
    best = {way: _at_best_rate(mine) for way, mine in groups.items()}
    every = {way[3]: mine for way, mine in best.items() if way[0] == "every-step"}
    lines = [_FEW_BYTES_HEAD]
    for (arm, inner, codec, optimiser), mine in sorted(best.items(), key=_every_step_first):
        exchange = "at every step" if arm == "every-step" else f"every {inner} steps, `{codec}`"
        fewer = "1" if arm == "every-step" else f"1/{mine[0]['fewer_up']:.0f}"
        beside = [_difference(mine, every[name]) for name in ("adamw", "muon")]
        cells = [exchange, f"`{optimiser}`", str(mine[0]["lr"]), _losses(mine), fewer, *beside]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _every_step_first(of: tuple[tuple[Any, ...], list[Row]]) -> tuple[Any, ...]:
    arm, inner, _, optimiser = of[0]
    return arm != "every-step", optimiser, inner


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by what they have under these keys."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _at_best_rate(rows: Sequence[Row]) -> list[Row]:
    """Those with the most seeds, and of these with the lowest mean loss, by seed."""

    def rank(mine: list[Row]) -> tuple[int, float]:
        return -len(mine), statistics.mean(row["losses"][-1] for row in mine)

    return sorted(min(_grouped(rows, "lr").values(), key=rank), key=lambda row: row["seed"])


def _difference(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Of mean losses over the seeds of both, in percent; empty for the same rows."""
    if rows == others:
        return ""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in others}
    mine, theirs = (
        statistics.mean(row["losses"][-1] for row in side if row["seed"] in seeds)
        for side in (rows, others)
    )
    return f"{100 * (mine / theirs - 1):+.1f} %".replace("-", "−")


def _named(optimiser: str) -> str:
    """Behind a method: its optimizer, unless that is AdamW."""
    return "" if optimiser == "adamw" else f", `{optimiser}`"


def adapters(results: dict[str, Any]) -> str:
    """Ways to make one adapter of many: loss, bytes, and what a version misses."""
    rows = results["rows"]
    lines = [_ADAPTERS_HEAD]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        falls = [row["first_loss"] - row["losses"][-1] for row in mine]
        off = max(row["off"] for row in mine)
        kilobytes = (f"{mine[0][key] / 1000:,.1f}" for key in ("bytes_up", "bytes_down"))
        missed = "nothing" if off < EXACT else f"{100 * off:.0f} %"
        cells = [f"`{way}`", _range(falls), *kilobytes, missed]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _of(results: dict[str, Any], course: str) -> list[Row]:
    return [row for row in results["rows"] if row["course"] == course]


def _all(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _shown(value: float) -> str:
    """.948 for an accuracy, 43 for a number of rounds."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.0f}"


def _mean(values: Sequence[float]) -> str:
    return _shown(statistics.mean(values))


def _spread(values: Sequence[float]) -> str:
    """The mean, and the deviation over the seeds."""
    return f"{_mean(values)} ± {_shown(statistics.stdev(values))}"


def _each(rows: Sequence[Row], key: str) -> str:
    """The mean, and the value of each seed."""
    values = _all(rows, key)
    return _mean(values) + (f" ({' '.join(map(_shown, values))})" if len(values) > 1 else "")


def _round(rows: Sequence[Row], key: str) -> str:
    """The mean number of rounds; a dash if a seed did not get there."""
    values = _all(rows, key)
    return "–" if None in values else _mean(values)


def _share(results: dict[str, Any], rows: Sequence[Row], whole: str) -> str:
    """Bytes up beside those of whole weights: 1/34, 2."""
    key = "bytes_up_a_round"
    times = statistics.mean(_all(rows, key)) / statistics.mean(_all(_of(results, whole), key))
    return f"{times:.0f}" if times > 0.75 else f"1/{1 / times:.0f}"


def _losses(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['losses'][-1]:.3f}" for row in rows)


def privacy(results: dict[str, Any], data: str = "edges") -> str:
    """ε against accuracy on `data`, which is a model of digits or a table: a line for each ε."""
    mine = [row for row in results["rows"] if data in (row.get("model"), row.get("table"))]
    ways = sorted({row.get("shared", 1) for row in mine})
    peers = mine[0]["peers"] if mine else 0
    heads = [f"noise that {way} of {peers} share" if way > 1 else "own noise" for way in ways]
    lines = [f"| ε of the run | {' | '.join(heads)} | seeds |", "|---" * (len(ways) + 2) + "|"]
    for epsilon in sorted({row["epsilon"] for row in mine}, key=lambda one: one or math.inf):
        found = [
            [row["accuracy"] for row in mine
             if (row["epsilon"], row.get("shared", 1)) == (epsilon, way)]
            for way in ways
        ]  # fmt: skip
        cells = [f"{epsilon:g}" if epsilon else "no noise", *map(_range, found)]
        lines.append(f"| {' | '.join(cells)} | {max(map(len, found))} |")
    return "\n".join(lines) + "\n"


def _range(values: Sequence[float]) -> str:
    """The mean, the least and the most; a dash for none."""
    if not values:
        return "–"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
