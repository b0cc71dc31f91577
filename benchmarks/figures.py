"""make figures: writes the figures of the README and docs/ from the results files in docs/.

Tables stand between `<!-- figures of NAME -->` and `<!-- end of figures -->`. Numbers in sentences
are those for which tests/docs/claims.toml names a key of a results file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faults import results as faults
from benchmarks.quality import page as quality
from benchmarks.quality import table_page
from benchmarks.speed import page as speed
from benchmarks.speed import small_tables

if TYPE_CHECKING:
    from tests.docs.claims import Claim

ROOT = Path(__file__).resolve().parents[1]
_END = "<!-- end of figures -->\n"
Table = Callable[[dict[str, Any]], str]
#: By page and name: the results file in docs/, and what makes the table of it.
TABLES: dict[tuple[str, str], tuple[str, Table]] = {
    ("README.md", "make bench"): ("bench/bench-results.json", speed.comparison),
    ("docs/benchmarks.md", "make bench"): ("bench/bench-results.json", speed.table),
    ("docs/benchmarks.md", "local training"): (
        "bench/bench-results.json",
        small_tables.training,
    ),
    ("docs/benchmarks.md", "sharing"): ("bench/egress-results.json", small_tables.egress),
    ("docs/benchmarks.md", "the monitor"): ("bench/monitor-results.json", small_tables.monitor),
    ("docs/jobs.md", "spreading rows"): ("bench/jobs-results.json", small_tables.jobs),
    ("docs/jobs.md", "serving"): ("bench/serve-results.json", small_tables.serve),
    **{
        ("docs/privacy.md", name): (
            "quality/privacy-results.json",
            partial(quality.privacy, data=data),
        )
        for name, data in (
            ("digits, a linear model", "edges"),
            ("digits, a network", "2nn"),
            ("breast cancer", "breast cancer"),
            ("blood tests", "flchain"),
        )
    },
    ("docs/large-models.md", "overlap"): ("bench/overlap-results.json", small_tables.overlap),
    ("docs/large-models.md", "late training"): (
        "bench/overlap-results.json",
        small_tables.late_training,
    ),
    ("docs/large-models.md", "slow lines"): (
        "bench/slow-lines-results.json",
        small_tables.slow_lines,
    ),
    ("docs/large-models.md", "limits"): ("bench/floors-results.json", small_tables.limits),
    ("docs/large-models.md", "processor time"): (
        "bench/floors-results.json",
        small_tables.processor_time,
    ),
    ("docs/large-models.md", "adapters"): ("quality/adapters.json", quality.adapters),
    ("docs/quality.md", "codecs"): ("quality/quality-results.json", quality.codecs),
    ("docs/quality.md", "strategies"): ("quality/quality-results.json", quality.strategies),
    ("docs/quality.md", "cameras"): ("quality/quality-results.json", quality.cameras),
    ("docs/quality.md", "lying peers"): ("quality/quality-results.json", quality.lying),
    ("docs/quality.md", "one liar"): ("quality/quality-results.json", quality.one_liar),
    ("docs/quality.md", "few exchanges"): ("quality/language.json", quality.language),
    ("docs/large-models.md", "few bytes"): ("quality/language.json", quality.few_bytes),
    ("docs/quality.md", "slow peers"): (
        "bench/stragglers-results.json",
        small_tables.stragglers,
    ),
    ("docs/tables.md", "models"): ("quality/tables-results.json", table_page.tables),
    ("docs/tables.md", "held-out tables"): (
        "quality/tables-held-out.json",
        table_page.held_out_tables,
    ),
    ("docs/tables.md", "secure trees"): ("quality/secure-trees.json", table_page.secure_trees),
    ("docs/reliability.md", "make faults"): ("faults/fault-results.json", faults.page),
    ("docs/cluster.md", "make faults-cluster"): ("faults/leader-results.json", faults.page),
    ("docs/cluster.md", "many agents"): ("bench/bench-results.json", small_tables.load),
}


def with_table(text: str, name: str, made: str) -> str:
    """The text with this table between its marks. Raises ValueError if it has no such marks."""
    begin = f"<!-- figures of {name} -->\n"
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(_END)
    if not (found and end):
        raise ValueError(f"there is no place for the figures of {name}")
    return before + begin + made + end + after


def made(page: str, name: str) -> str:
    """The table, from its results file."""
    file, table = TABLES[page, name]
    return table(json.loads((ROOT / "docs" / file).read_bytes()))


def write_tables() -> None:
    """Write every table into its page."""
    for page, name in TABLES:
        path = ROOT / page
        path.write_text(with_table(path.read_text(), name, made(page, name)))


def write_numbers() -> list[str]:
    """Write the measured numbers of sentences; return what has to be written by hand."""
    from tests.docs import claims

    listed, by_hand = claims.load(), []
    for page in sorted({claim.page for claim in listed}):
        path = ROOT / page
        text, missed = with_numbers(path.read_text(), [c for c in listed if c.page == page])
        path.write_text(text)
        by_hand += [f"{page}: {what}" for what in missed]
    return by_hand


def with_numbers(text: str, listed: Sequence[Claim]) -> tuple[str, list[str]]:
    """The text of a page with its measured numbers, and what has to be written by hand."""
    from tests.docs import claims

    by_hand = []
    for claim in listed:
        found = claim.pattern.search(text)
        if found is None:
            by_hand.append(f"not found: {claim.excerpt}")
            continue
        # From the end, so that the earlier places stay where they are.
        for number in range(len(claim.values), 0, -1):
            expression, shown = claim.values[number - 1], found[number]
            if not claims.is_measured(expression):
                continue
            value = claims.value(expression)
            if claims.fits(shown, value, rounded=True):
                continue
            try:
                new = claims.written(shown, value)
            except ValueError as err:
                by_hand.append(f"{claim.excerpt}: {err}")
            else:
                text = text[: found.start(number)] + new + text[found.end(number) :]
    return text, by_hand


def main() -> int:
    write_tables()
    by_hand = write_numbers()
    print("\n".join(by_hand), file=sys.stderr if by_hand else sys.stdout)
    return 1 if by_hand else 0


if __name__ == "__main__":
    sys.exit(main())
