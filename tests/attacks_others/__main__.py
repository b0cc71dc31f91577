"""Attacks on the secure aggregation of other systems, and the same on ours: `make attacks-others`.

Each system is installed at fixed versions in an environment of its own, .venv-extras/NAME. The
attacks use its own functions. The exit status is 1 if an attack works on commonweight, or does not
work where docs/comparison.md says that it does. A system that cannot be installed is *not run*.

    python -m tests.attacks_others          searches a part of Flower's seeds
    python -m tests.attacks_others --full   searches all of them
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.attacks_others.measures import SYSTEM_OF, Finding, read
from tests.support.environments import ROOT, NotRun, environment

HERE = Path(__file__).parent
ATTACKED_WITHIN_S = 3600


class Row(NamedTuple):
    """One attack: the system that it is for, what came of it there, and on commonweight.

    `theirs`: None if the system cannot be installed.
    """

    system: str
    theirs: Finding | None
    ours: Finding

    def cells(self) -> tuple[str, str, str, str]:
        return self.system, self.ours.attack, _result(self.theirs), _result(self.ours)

    def contradictions(self) -> Iterator[str]:
        """What is not as the docs say."""
        if self.ours.works:
            yield f"this attack works on commonweight: {self.ours.attack}"
        if self.theirs is not None and not self.theirs.works:
            yield f"the docs say that this attack works on {self.system}: {self.ours.attack}"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks_others")
    parser.add_argument("--full", action="store_true", help="search all of Flower's seeds")
    full = parser.parse_args(words).full
    version, ours = attack(sys.executable, "ours")
    rows: list[Row] = []
    for system in dict.fromkeys(SYSTEM_OF.values()):
        name = system.lower()
        title, theirs = system, dict[str, Finding]()
        print(f"installs {system} in .venv-extras/{name}", flush=True)
        try:
            python = environment(name, ["-r", str(HERE / f"{name}.txt")], [str(ROOT)])
        except NotRun as why:
            print(f"{system} is not run: {why}")
        else:
            more = ["--full"] if full and system == "Flower" else []
            their_version, findings = attack(str(python), name, *more)
            title, theirs = f"{system} {their_version}", {one.attack: one for one in findings}
        rows += [
            Row(title, theirs[one.attack] if theirs else None, one)
            for one in ours
            if SYSTEM_OF[one.attack] == system
        ]
    print(report(rows, f"commonweight {version}"))
    return int(any(line for row in rows for line in row.contradictions()))


def attack(python: str, name: str, *words: str) -> tuple[str, list[Finding]]:
    """The version of a system, and what came of the attacks on it, from a process of its own."""
    program = [python, "-m", f"tests.attacks_others.on_{name}", *words]
    done = subprocess.run(
        program, cwd=ROOT, timeout=ATTACKED_WITHIN_S, stdout=subprocess.PIPE, text=True, check=True
    )
    return read(done.stdout.splitlines()[-1])


def report(rows: Sequence[Row], ours: str) -> str:
    """The table, what shows each result, and the contradictions."""
    cells = [("system", "attack", "there", ours), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for row in rows:
        lines += ["", f"{row.ours.attack}:"]
        lines += [f"  {row.system}: {row.theirs.detail}"] if row.theirs else []
        lines += [f"  {ours}: {row.ours.detail}"]
    wrong = [line for row in rows for line in row.contradictions()]
    return "\n".join([*lines, *([""] if wrong else []), *wrong])


def _result(finding: Finding | None) -> str:
    if finding is None:
        return "not run"
    return "works" if finding.works else "fails"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
