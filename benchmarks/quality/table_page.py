"""The figures of docs/tables.md, from the results in docs/quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def tables(results: dict[str, Any]) -> str:
    """Models of each table: what peers learn together, one alone, and XGBoost from all rows."""
    keys = {
        "linear": "linear",
        "MLP": "mlp",
        "trees": "trees",
        "trees, `--secure`": "secure",
        "with `--rounds`": "auto",
        "personal": "personal",
        "best peer alone": "alone",
        "XGBoost": "central",
        "with the same cuts": "central_cuts",
    }
    return _table_models(results, keys, {"auto": "chosen"}, with_split=True)


def held_out_tables(results: dict[str, Any]) -> str:
    """The same without any setting, on tables that chose no default."""
    keys = {
        "`auto`": "auto",
        "personal": "personal",
        "blend": "blend",
        "`--secure`": "secure",
        "trees, `--secure`": "secure_trees",
        "best peer alone": "alone",
        "XGBoost": "central",
        "its defaults": "central_defaults",
    }
    if not any("blend" in row for row in results["rows"]):
        del keys["blend"]
    chosen = {"auto": "chosen", "secure": "secure_chosen"}
    near = sum(_is_near(row, "secure", "central") for row in results["rows"])
    text = _table_models(results, keys, chosen, with_split=False).rstrip("\n")
    text += f" With `--secure`, {near} of {len(results['rows'])} rows are within 3 % of XGBoost."
    return text + _of_blends([row for row in results["rows"] if "blend" in row]) + "\n"


def _of_blends(rows: Sequence[Row]) -> str:
    """How often a blend is at least as good as other models."""
    if not rows:
        return ""
    over = {
        key: sum(_loss_of(row, "blend") <= _loss_of(row, key) for row in rows)
        for key in ("alone", "auto")
    }
    return (
        f" The blend is at least as good as the best peer alone in {over['alone']} of {len(rows)} "
        f"rows, and as the shared model in {over['auto']}."
    )


#: What peers have, by how the rows are split.
_HAVE = {"grouped": "with groups", "60, 30 and 10 %": "with rows at random"}


def secure_trees(results: dict[str, Any]) -> str:
    """Trees of secure sums beside XGBoost with the same cuts and rows."""
    lines = [
        "| table | peers | trees, `--secure` | and `data.min_count` 1 | XGBoost, same cuts |\n",
        "|---|---|---|---|---|\n",
    ]
    keys = ("secure", "secure_one", "central_cuts")
    for row in results["rows"]:
        shown = [_score(row["metric"], row[key]) for key in keys]
        cells = [f"{row['table']}, {row['metric']}", row["split"], *shown]
        lines.append("| " + " | ".join(cells) + " |\n")
    told = []
    for split in dict.fromkeys(row["split"] for row in results["rows"]):
        of = [row for row in results["rows"] if row["split"] == split]
        good, good_one = (sum(_is_as_good(row, key) for row in of) for key in keys[:2])
        told.append(
            f"{good} of {len(of)} tables ({good_one} with `data.min_count` 1) of peers "
            f"{_HAVE[split]}"
        )
    return "".join(lines) + (
        f"\nTrees are at most 0.003 AUC or 1 % RMSE worse than XGBoost on {'; on '.join(told)}.\n"
    )


def _is_as_good(row: Row, key: str) -> bool:
    """True if trees are at most 0.003 AUC or 1 % RMSE worse than XGBoost with the same cuts."""
    if row["metric"] == "AUC":
        return bool(row[key] >= row["central_cuts"] - 0.003)
    return bool(row[key] <= 1.01 * row["central_cuts"])


def _table_models(
    results: dict[str, Any], keys: dict[str, str], chosen: dict[str, str], *, with_split: bool
) -> str:
    """A line for each row of the results, with the model that was `chosen` where that is known."""
    names = ["table", "rows", *(["peers"] if with_split else []), *keys]
    lines = ["| " + " | ".join(names) + " |\n", "|" + "---|" * len(names) + "\n"]
    for row in results["rows"]:
        shown = {
            key: _score(row["metric"], row[key]) if key in row else "–" for key in keys.values()
        }
        for key, by in chosen.items():
            shown[key] = f"{_MODELS[row[by]]} {shown[key]}"
        cells = [f"{row['table']}, {row['metric']}", f"{row['rows']:,}"]
        cells += [row["split"]] if with_split else []
        lines.append("| " + " | ".join([*cells, *shown.values()]) + " |\n")
    return "".join([*lines, "\n", _against_alone(results["rows"])])


def _score(metric: str, value: float) -> str:
    if metric == "AUC":
        return f"{value:.4f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _against_alone(rows: Sequence[Row]) -> str:
    """How often a peer has a better model without others, and how much better."""
    worse = [
        (row["metric"], row[key] - row["alone"], row["alone"])
        for row in rows
        for key in [min(("auto", "personal"), key=lambda key: _loss_of(row, key))]
        if _loss_of(row, key) > _loss_of(row, "alone")
    ]
    text = (
        f"In {len(rows) - len(worse)} of {len(rows)} rows the shared or the personal model is at "
        "least as good as the best peer alone."
    )
    areas = [-off for metric, off, _ in worse if metric == "AUC"]
    errors = [off / alone for metric, off, alone in worse if metric == "RMSE"]
    told = [f"{max(areas):.4f} AUC"] if areas else []
    told += [f"{max(errors):.1%} RMSE".replace("%", " %")] if errors else []
    return text + (f" In the others, at most {' or '.join(told)} is missing.\n" if told else "\n")


def _is_near(row: Row, key: str, other: str) -> bool:
    """True if a score is better than another one, or at most 3 % worse."""
    if row["metric"] == "AUC":
        return bool(row[key] >= 0.97 * row[other])
    return bool(row[key] <= 1.03 * row[other])


def _loss_of(row: Row, key: str) -> float:
    """Lower is better."""
    return float(-row[key] if row["metric"] == "AUC" else row[key])


#: What a page calls a model of tables.
_MODELS = {"linear": "linear", "mlp": "MLP", "trees": "trees"}
