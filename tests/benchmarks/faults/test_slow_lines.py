"""Results of slow lines are kept by the size of the update and the mode."""

from __future__ import annotations

from benchmarks.faults.slow_lines import with_row


def test_a_result_replaces_the_earlier_one_of_its_size_and_mode() -> None:
    def row(megabytes: float, mode: str, versions: int) -> dict[str, object]:
        return {"megabytes": megabytes, "mode": mode, "versions": versions}

    small, large = row(96.0, "fold", 1), row(758.0, "fold", 2)
    assert with_row([large], row(96.0, "buffered", 3))[0]["mode"] == "buffered"
    assert with_row([small, large], row(96.0, "fold", 4)) == [row(96.0, "fold", 4), large]
