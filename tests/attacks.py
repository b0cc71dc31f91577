"""The tables of attacks in docs/attacks.md, from the tests that try them: `make attacks`.

An attack is a test with the mark `attack(NUMBER, by=ATTACKER)`. Its docstring begins with
"Attack: …." or, if it shows that honest work continues beside the defence, or that the attack works
without it, with "Control: ….".
Every test in tests/hostile has the mark, by itself or by its file's `pytestmark`; a test elsewhere
may have it.

    python -m tests.attacks            run them all, quick and long, and write the tables
    python -m tests.attacks --new      run those that have no result in the tables yet
    python -m tests.attacks FILE …     run those of these files
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests"
PAGE = ROOT / "docs" / "attacks.md"
THREATS = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- attacks -->\n", "<!-- end of attacks -->"
ATTACKERS = (
    *("stranger", "network", "broker", "peer", "coordinator", "observer", "operator"),
    *("requester", "task", "thief", "dependency"),
)
STOPPED, WORKS, OPEN, FAILS, NOT_RUN = "stopped", "works", "**open**", "**fails**", "not run"


class Numbered(NamedTuple):
    """An attack of the audit, or a group of attacks: what it is and who tries it.

    `reason` says why there is no test of it, while there is none.
    """

    attack: str
    by: str
    reason: str = ""


#: The numbers and words that a mark may have.
NUMBERED = {
    "1": Numbered("hijack a machine that joins, with a second CA certificate", "stranger"),
    "2": Numbered("learn single rows by questions", "requester"),
    "3": Numbered("single out rows by training, evaluation and surveys", "coordinator"),
    "4": Numbered("send names that are paths", "coordinator"),
    "5": Numbered("own the model as one peer", "peer"),
    "6": Numbered("stop the coordinator with a huge answer", "peer"),
    "7": Numbered("listen, speak for others and flood on MQTT", "peer"),
    "8": Numbered("read agents' logs and answers beyond one's role", "observer"),
    "9": Numbered("fill the coordinator's disk with answers of jobs", "peer"),
    "10": Numbered("fill a machine's memory or disk", "coordinator"),
    "11": Numbered("show peers different versions", "coordinator"),
    "12": Numbered("send machines to an address of the attacker's choice", "peer"),
    "13": Numbered("pass a signed request on to another receiver", "peer"),
    "14": Numbered("run a formula in a spreadsheet, or forge rows in a terminal", "peer"),
    "15": Numbered("imitate a name, or join several times with one ticket", "peer"),
    "16": Numbered("use a port that the owner does not know of", "stranger"),
    "models": Numbered("learn single rows by statistical models", "requester"),
    "consent": Numbered("run a task that the owner did not allow", "coordinator"),
    "offers": Numbered(
        "have an offered task file run that its owner did not approve", "coordinator"
    ),
    "apps": Numbered("do more with a Flower app than its owner and operator allowed", "task"),
    "sandbox": Numbered("attack the owner's machine from inside a task", "task"),
    "keys": Numbered("use stolen keys", "thief"),
    "audit": Numbered("rewrite the history of the fleet", "coordinator"),
    "provenance": Numbered("install another package than the one that was tested", "dependency"),
    "strangers": Numbered("get in without belonging to the fleet", "stranger"),
    "wire": Numbered("send malformed, oversized, slow or repeated messages", "stranger"),
    "secure": Numbered("learn one peer's update from a secure run", "coordinator"),
    "questions": Numbered("learn one peer's answer to a secure question", "coordinator"),
    "secrets": Numbered("find secrets that lie about, or have data run as code", "thief"),
}

#: Further names that a mark may have.
ALSO = {"23.4": "apps", "23.5": "offers", "24.3": "models"}

#: What only a later feature can close: number, attack, attacker, why it is open.
LATER = (
    (
        *("3", "look at the update of one peer in a run without `--secure`", "coordinator"),
        "the coordinator adds the updates up; `run start --secure` hides each of them",
    ),
    (
        *("3", "rebuild rows from updates of crafted weights (Fowl et al. 2022)", "coordinator"),
        "the owner's limits make it take more updates; a run with noise (`--dp`) stops it, and an "
        "owner can demand it (`privacy.max_epsilon`)",
    ),
    (
        *(
            "3",
            "tell by a run's model made for one row whether that row is held out",
            "coordinator",
        ),
        "metrics of a run's evaluations are exact; with `privacy.max_epsilon`, none leaves",
    ),
    (
        *("2", "put very many exact answers together, knowing most of the rows", "requester"),
        "the sets of rows are limited in number; only noise (`analyze_epsilon`) has a bound",
    ),
    (
        *(
            "secure",
            "compute single updates from sums with other peers, weights or settings",
            "coordinator",
        ),
        "nearly the same updates can be asked for in many ways; only noise (`--dp`) has a bound",
    ),
    (
        *(
            "questions",
            "ask with and without a condition that leaves out some rows of one peer alone",
            "requester",
        ),
        "no peer knows whether the rows of the others have changed, too; a condition that leaves "
        "out all rows of one peer is refused",
    ),
    (
        *("5", "spoil the model by updates within all bounds", "peer"),
        "an update is not compared with the data behind it, which stays where it is",
    ),
)


class Test(NamedTuple):
    """A test of an attack, or of honest work beside a defence (`is_control`)."""

    numbers: tuple[str, ...]
    attack: str
    by: str
    is_control: bool
    file: str  # from the folder of the project
    name: str

    @property
    def node(self) -> str:
        return f"{self.file}::{self.name}"

    @property
    def shown(self) -> str:
        """The test's name in the table; files of tests/hostile have no folder there."""
        return self.node.removeprefix("tests/hostile/")


# --- finding the tests -----------------------------------------------------------------------


def faults() -> list[str]:
    """What is wrong with the marks and docstrings of the tests."""
    return [fault for path in _files() for _, fault in _tests(path) if fault]


def find_tests() -> list[Test]:
    """Every test of an attack, by its first number, then as they lie in their files."""
    found = [test for path in _files() for test, _ in _tests(path) if test]
    order = list(NUMBERED)
    return sorted(found, key=lambda test: order.index(test.numbers[0]))


def names_of_tests() -> set[str]:
    """The name of every test, of attacks and others."""
    texts = (path.read_text() for path in HERE.rglob("test_*.py"))
    return {
        name for text in texts for name in re.findall(r"^ *(?:async )?def (test_\w+)", text, re.M)
    }


def _files() -> list[Path]:
    everywhere = sorted(HERE.rglob("test_*.py"))
    return [path for path in everywhere if _is_hostile(path) or "mark.attack(" in path.read_text()]


def _is_hostile(path: Path) -> bool:
    return path.parent == HERE / "hostile"


def _tests(path: Path) -> Iterator[tuple[Test | None, str]]:
    """Each test of a file, or what is wrong with it."""
    tree = ast.parse(path.read_text())
    of_file = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in _marks(node.value)
    ]
    file = str(path.relative_to(ROOT))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("test_"):
            continue
        own = [mark for decorator in node.decorator_list for mark in _marks(decorator)]
        if marks := own or of_file:
            yield _read(marks, ast.get_docstring(node) or "", file, node.name)
        elif _is_hostile(path):
            yield None, f'{file}::{node.name}: add @pytest.mark.attack("20.NUMBER", by="…")'


def _marks(node: ast.expr) -> Iterator[tuple[str, str]]:
    """(number, by) of each attack mark in a decorator or in the value of `pytestmark`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.attack":
            by = {word.arg: ast.literal_eval(word.value) for word in call.keywords}.get("by", "")
            for argument in call.args:
                number = str(ast.literal_eval(argument))
                yield ALSO.get(number, number.removeprefix("20.")), by


def _read(
    marks: list[tuple[str, str]], docstring: str, file: str, name: str
) -> tuple[Test | None, str]:
    where = f"{file}::{name}"
    numbers = tuple(number for number, _ in marks)
    if unknown := set(numbers) - set(NUMBERED):
        return None, f"{where}: {sorted(unknown)} is not in NUMBERED of tests/attacks.py"
    by = marks[0][1] or NUMBERED[numbers[0]].by
    if by not in ATTACKERS:
        return None, f"{where}: {by!r} is not in ATTACKERS of tests/attacks.py"
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    found = re.match(r"(Attack|Control): (.+?)\.(?=\s|$)", paragraph)
    if found is None:
        return None, f'{where}: begin the docstring with "Attack: … ." or "Control: … ."'
    return Test(numbers, found[2], by, found[1] == "Control", file, name), ""


# --- running them ----------------------------------------------------------------------------


def run(words: list[str]) -> dict[str, str]:
    """Run pytest with these words; the result of each test by its node."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "attack", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *words], cwd=ROOT, check=False)
        return read_report(report.read_text()) if report.exists() else {}


def read_report(text: str) -> dict[str, str]:
    """The result of each test by its node; of several parameters, the worst."""
    found: dict[str, list[str]] = {}
    for case in ET.fromstring(text).iter("testcase"):
        node = f"{case.get('file')}::{str(case.get('name')).partition('[')[0]}"
        found.setdefault(node, []).append(_outcome(case))
    return {node: max(outcomes, key=_severity) for node, outcomes in found.items()}


def _outcome(case: ET.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return OPEN
    skipped = case.find("skipped")
    if skipped is None:
        return STOPPED
    why = " ".join(str(skipped.get("message")).split())
    return f"{OPEN if skipped.get('type') == 'pytest.xfail' else NOT_RUN}: {why}"


def _severity(outcome: str) -> int:
    """A test is `stopped` if some of its parameters ran; a skipped one counts least."""
    return {OPEN: 2, NOT_RUN: 0}.get(outcome.partition(":")[0], 1)


# --- the tables ------------------------------------------------------------------------------


def tables(tests: list[Test], results: dict[str, str]) -> str:
    """The numbered attacks, what a later feature has to close, and every test."""
    lines = ["| no. | attack | by | result | tests |", "|---|---|---|---|---|"]
    lines += [_numbered_row(number, tests, results) for number in NUMBERED]
    lines += ["", "Open today:", ""]
    lines += ["| no. | attack | by | result | why |", "|---|---|---|---|---|"]
    lines += [
        f"| {number} | {attack} | {by} | {OPEN} | {why} |" for number, attack, by, why in LATER
    ]
    lines += ["", "## Every test", ""]
    lines += [
        f"{STOPPED.capitalize()}: the attack fails. {WORKS.capitalize()}: honest work continues "
        "beside the defence, or the attack works where there is no such defence. Files without a "
        "folder are in `tests/hostile`.",
        "",
    ]
    lines += ["| no. | attack | by | result | test |", "|---|---|---|---|---|"]
    lines += [test_row(test, results.get(test.node, NOT_RUN)) for test in tests]
    return "\n".join(lines) + "\n"


def _numbered_row(number: str, tests: list[Test], results: dict[str, str]) -> str:
    attack, by, reason = NUMBERED[number]
    of_it = [test for test in tests if number in test.numbers and not test.is_control]
    if not of_it:
        return f"| {number} | {attack} | {by} | {OPEN}: {reason} | – |"
    told = {results.get(test.node, NOT_RUN).partition(":")[0] for test in of_it}
    result = next((word for word in (OPEN, NOT_RUN) if word in told), STOPPED)
    files = ", ".join(f"`{file}`" for file in dict.fromkeys(map(_file_shown, of_it)))
    return f"| {number} | {attack} | {by} | {result} | {len(of_it)} in {files} |"


def _file_shown(test: Test) -> str:
    return test.shown.partition("::")[0]


def test_row(test: Test, result: str) -> str:
    number, attack = ", ".join(test.numbers), test.attack.replace("|", "\\|")
    by = "–" if test.is_control else test.by
    if test.is_control:
        result = {STOPPED: WORKS, OPEN: FAILS}.get(result, result)
    return f"| {number} | {attack} | {by} | {result} | `{test.shown}` |"


def results_in(page: str, tests: list[Test]) -> dict[str, str]:
    """The results in the page's table, of the tests that are there."""
    by_name = {test.shown: test for test in tests}
    found = {}
    for row in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        test = by_name.get(cells[5].strip("`")) if len(cells) == 7 else None
        if test and cells[4] != NOT_RUN:
            found[test.node] = {WORKS: STOPPED, FAILS: OPEN}.get(cells[4], cells[4])
    return found


def tables_in(page: str) -> str:
    """The tables between the page's marks."""
    return page.partition(BEGIN)[2].partition(END)[0]


def with_tables(page: str, made: str) -> str:
    """The page with these tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no {BEGIN.strip()} … {END}")
    return before + BEGIN + made + end + after


def main(words: list[str]) -> int:
    """Exit status 1 if an attack succeeds, a control fails, or a test is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("files", nargs="*", help="run the tests of these files only")
    parser.add_argument("--new", action="store_true", help="run those without a result only")
    asked = parser.parse_args(words)
    if wrong := faults():
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    tests = find_tests()
    known = results_in(PAGE.read_text(), tests) if asked.new or asked.files else {}
    if asked.new:
        chosen = [test.node for test in tests if known.get(test.node, NOT_RUN)[:7] == NOT_RUN]
    else:
        chosen = asked.files or sorted({test.file for test in tests})
    results = known | (run(chosen) if chosen else {})
    PAGE.write_text(with_tables(PAGE.read_text(), tables(tests, results)))
    failed = [test.node for test in tests if results.get(test.node) == OPEN]
    not_run = [test.node for test in tests if results.get(test.node, NOT_RUN).startswith(NOT_RUN)]
    print(f"{len(tests)} tests in {PAGE.relative_to(ROOT)}: {len(failed)} failed")
    for word, nodes in (("failed", failed), ("not run", not_run)):
        for node in nodes:
            print(f"{word}: {node}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
