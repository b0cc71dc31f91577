"""Sentences of docs/quality.md that no single figure of the results shows."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from benchmarks.quality import page, table_page
from benchmarks.quality.liars import LIES
from benchmarks.quality.measured import RESULTS
from tests.support.fleet_harness import ROOT

ROWS = json.loads((ROOT / "docs" / "quality" / RESULTS).read_bytes())["rows"]


def every(course: str, key: str) -> list[Any]:
    found = [row[key] for row in ROWS if row["course"] == course]
    assert found, course
    return found


def mean(course: str, key: str) -> float:
    return statistics.mean(every(course, key))


def test_fedavg_at_random_splits_is_within_two_thousandths_of_the_known() -> None:
    assert abs(round(mean("fp32, iid", "end"), 3) - 0.949) <= 0.002


def test_int8_is_as_good_as_whole_weights() -> None:
    for split in ("iid", "shards"):
        int8, fp32 = f"int8, {split}", f"fp32, {split}"
        assert round(mean(int8, "end"), 3) == round(mean(fp32, "end"), 3)
        assert every(int8, "to_90") == every(fp32, "to_90")


def test_robust_strategies_stay_within_three_points() -> None:
    (clean,) = every("fedavg, nobody lies", "end")
    for strategy in ("fedtrimmedavg", "fedmedian", "multikrum"):
        for attack in ("sign turned", "fourfold"):
            assert mean(f"{strategy}, {attack}", "end") >= clean - 0.03
    assert mean("fedavg, sign turned", "end") < clean - 0.03


def test_one_liar_costs_less_than_two_points_at_random_splits() -> None:
    results = {"rows": ROWS}
    for lie in LIES:
        key = "chosen" if lie == "false metrics" else "end"
        found = page.points_of_one_liar(results, f"one of ten: {lie}", "iid", key)
        assert len(found) == 5, lie
        assert statistics.mean(found) > -2, lie
    turned = page.points_of_one_liar(results, "one of ten: sign flip", "shards", "end")
    assert statistics.mean(turned) < -5


def test_what_is_slower_or_faster_than_known() -> None:
    assert round(mean("topk, shards", "best"), 3) == 0.909 - 0.001
    for course, key, known in (
        ("fp32, iid", "to_93", 9),
        ("topk, iid", "to_90", 9),
        ("topk, iid", "to_92", 15),
        ("sign, shards", "to_90", 55),
    ):
        assert round(known - mean(course, key)) == 2, course


def test_ternary_with_scaffold_needs_less_than_half_of_the_rounds() -> None:
    assert mean("scaffold + ternary, shards", "to_90") < 0.5 * mean("fp32, shards", "to_90")


def noisy(data: str, epsilon: float, *, shared: bool) -> float:
    """The mean accuracy on these data at ε."""
    found = [
        row["accuracy"]
        for row in json.loads((ROOT / "docs/quality/privacy-results.json").read_bytes())["rows"]
        if data in (row.get("model"), row.get("table"))
        and row["epsilon"] == epsilon
        and ("shared" in row) == shared
    ]
    assert len(found) == 5, (data, epsilon, shared)
    return statistics.mean(found)


def test_shared_noise_costs_little_of_the_accuracy_of_digits() -> None:
    assert noisy("edges", 3.0, shared=True) >= 0.94
    assert noisy("edges", 1.0, shared=True) >= 0.91


@pytest.mark.parametrize("data", ["edges", "breast cancer", "flchain"])
def test_shared_noise_costs_no_more_than_own_noise(data: str) -> None:
    for epsilon in (1.0, 3.0, 8.0):
        assert noisy(data, epsilon, shared=True) >= noisy(data, epsilon, shared=False) - 0.005


def test_adapters_of_the_same_rounds_are_compared() -> None:
    rows = json.loads((ROOT / "docs/quality/adapters.json").read_bytes())["rows"]
    by_way = {
        way: [r for r in rows if r["way"] == way] for way in ("ffa", "stack", "svd", "average")
    }
    assert len({tuple(row["seed"] for row in mine) for mine in by_way.values()}) == 1
    assert len({(row["rounds"], row["lr"]) for row in rows}) == 1
    for way in ("ffa", "stack"):
        assert all(row["off"] < page.EXACT for row in by_way[way])
    assert all(row["off"] > 0.01 for row in by_way["average"])
    for row in by_way["svd"]:  # what is missing is what was cut
        assert row["off"] == pytest.approx(row["cut"], rel=1e-3)
    ffa, stack, svd, average = (by_way[way][0] for way in by_way)
    assert 1.8 < average["bytes_up"] / ffa["bytes_up"] < 2.2
    assert average["bytes_down"] == svd["bytes_down"] == 2 * ffa["bytes_down"]
    assert stack["bytes_down"] > 4 * average["bytes_down"]
    assert all(row["losses"][-1] < row["first_loss"] for row in rows)


def test_the_page_of_tables_counts_where_a_peer_is_better_alone() -> None:
    def row(
        metric: str, auto: float, personal: float, alone: float, secure: float
    ) -> table_page.Row:
        return {
            "table": "t", "rows": 1000, "metric": metric, "auto": auto, "personal": personal,
            "alone": alone, "secure": secure, "secure_trees": secure, "central": 0.9,
            "central_defaults": 0.9, "chosen": "mlp", "secure_chosen": "trees",
        }  # fmt: skip

    rows = [
        row("AUC", 0.8, 0.9, 0.85, 0.86),
        row("AUC", 0.84, 0.8, 0.85, 0.88),
        row("RMSE", 1.2, 1.1, 1.0, 0.91),
        row("RMSE", 1500.0, 9.0, 9.0, 1.0),
    ]
    shown = table_page.held_out_tables({"rows": rows})
    assert "| MLP 1,500 | 9 | trees 1 |" in shown
    assert (
        "In 2 of 4 rows the shared or the personal model is at least as good as the best peer "
        "alone. In the others, at most 0.0100 AUC or 10.0 % RMSE is missing. With `--secure`, 2 "
        "of 4 rows are within 3 % of XGBoost."
    ) in shown


def test_secure_trees_are_counted_by_how_peers_share_the_rows() -> None:
    def row(split: str, metric: str, *scores: float) -> table_page.Row:
        keys = ("secure", "secure_one", "central_cuts")
        return {"table": "a", "split": split, "metric": metric} | dict(
            zip(keys, scores, strict=True)
        )

    shown = table_page.secure_trees(
        {
            "rows": [
                row("grouped", "AUC", 0.897, 0.9, 0.9),
                row("grouped", "RMSE", 101.1, 101.0, 100.0),
                row("60, 30 and 10 %", "AUC", 0.896, 0.896, 0.9),
            ]
        }
    )
    assert "| a, AUC | grouped | 0.8970 | 0.9000 | 0.9000 |" in shown
    assert shown.endswith(
        "on 1 of 2 tables (2 with `data.min_count` 1) of peers with groups; on 0 of 1 tables (0 "
        "with `data.min_count` 1) of peers with rows at random.\n"
    )
