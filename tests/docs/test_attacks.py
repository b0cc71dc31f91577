"""Each test of an attack says what it tries, and who tries it (tests/attacks.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import attacks

#: In docs/security.md: what a row says if no test shows it.
NOTHING = "nothing"


def test_each_row_of_the_threat_model_names_tests_that_exist() -> None:
    text = attacks.THREATS.read_text().partition("## Who attacks")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| (?!tries to|has \||---)(.+?) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE
    )
    assert len(rows) > 50
    tests = attacks.names_of_tests()
    for tries, shown_by in rows:
        named = re.findall(r"`(test_\w+)`", shown_by)
        assert shown_by == (", ".join(f"`{name}`" for name in named) or NOTHING), tries
        assert set(named) <= tests, (tries, set(named) - tests)


def test_each_test_that_a_page_names_exists() -> None:
    tests = attacks.names_of_tests()
    for page in attacks.THREATS.parent.glob("**/*.md"):
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named <= tests, (page.name, named - tests)


def test_each_attack_has_a_number_an_attacker_and_a_sentence() -> None:
    wrong = attacks.faults()
    assert not wrong, "\n".join(wrong)


def test_a_fault_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "hostile"
    folder.mkdir(parents=True)
    monkeypatch.setattr(attacks, "ROOT", tmp_path)
    monkeypatch.setattr(attacks, "HERE", tmp_path / "tests")
    (folder / "test_a.py").write_text(
        "def test_1(): pass\n"
        "@pytest.mark.attack('20.99')\ndef test_2(): 'Attack: x.'\n"
        "@pytest.mark.attack('20.4', by='nobody')\ndef test_3(): 'Attack: x.'\n"
        "@pytest.mark.attack('20.4')\ndef test_4(): 'It is refused.'\n"
        "@pytest.mark.attack('20.4')\ndef test_5(): 'Attack: x\\n\\n    Really.'\n"
        "@pytest.mark.attack('20.4')\ndef test_6(): 'Attack: x of\\n    a | b. More.'\n"
    )
    wrong = attacks.faults()
    assert [fault.partition(": ")[0][-1] for fault in wrong] == ["1", "2", "3", "4", "5"]
    (test,) = attacks.find_tests()
    assert (test.attack, test.by, test.numbers) == ("x of a | b", "coordinator", ("4",))


def test_a_mark_of_the_file_holds_for_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tests" / "hostile"
    folder.mkdir(parents=True)
    monkeypatch.setattr(attacks, "ROOT", tmp_path)
    monkeypatch.setattr(attacks, "HERE", tmp_path / "tests")
    (folder / "test_a.py").write_text(
        "pytestmark = [pytest.mark.long, pytest.mark.attack('20.sandbox')]\n"
        "def test_1(): 'Control: x.'\n"
        "@pytest.mark.attack('20.7', by='broker')\ndef test_2(): 'Attack: y.'\n"
    )
    by_name = {test.name: test for test in attacks.find_tests()}
    assert by_name["test_1"].is_control
    assert by_name["test_1"].numbers == ("sandbox",)
    assert (by_name["test_2"].numbers, by_name["test_2"].by) == (("7",), "broker")


REPORT = """<testsuites><testsuite>
<testcase file="tests/a.py" name="test_a[x]"/>
<testcase file="tests/a.py" name="test_a[y]"><failure message="no"/></testcase>
<testcase file="tests/a.py" name="test_b"/>
<testcase file="tests/a.py" name="test_c[x]"><skipped type="skip" message="no root"/></testcase>
<testcase file="tests/a.py" name="test_c[y]"/>
<testcase file="tests/a.py" name="test_d"><skipped type="pytest.skip" message="no root"/></testcase>
<testcase file="tests/a.py" name="test_e"><skipped type="pytest.xfail" message="later"/></testcase>
<testcase file="tests/a.py" name="test_f"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_a_test_is_as_good_as_its_worst_parameter() -> None:
    assert attacks.read_report(REPORT) == {
        "tests/a.py::test_a": attacks.OPEN,
        "tests/a.py::test_b": attacks.STOPPED,
        "tests/a.py::test_c": attacks.STOPPED,
        "tests/a.py::test_d": "not run: no root",
        "tests/a.py::test_e": f"{attacks.OPEN}: later",
        "tests/a.py::test_f": attacks.OPEN,
    }


def test_the_results_are_read_from_the_page_again() -> None:
    stopped, control, open_, skipped = (
        attacks.Test(("4",), "a | b", "peer", name == "test_c", "tests/hostile/test_a.py", name)
        for name in ("test_s", "test_c", "test_o", "test_n")
    )
    tests = [stopped, control, open_, skipped]
    results = {
        stopped.node: attacks.STOPPED,
        control.node: attacks.STOPPED,
        open_.node: attacks.OPEN,
        skipped.node: "not run: no root",
    }
    made = attacks.tables(tests, results)
    assert "| 4 | a \\| b | – | works | `test_a.py::test_c` |" in made
    page = attacks.with_tables(f"before\n{attacks.BEGIN}old\n{attacks.END}\nafter\n", made)
    assert page.startswith("before\n")
    assert page.endswith(f"{attacks.END}\nafter\n")
    assert "old\n" not in page
    assert attacks.tables_in(page) == made
    assert attacks.results_in(page, tests) == results
    shorter = page.replace("not run: no root", "not run")
    assert skipped.node not in attacks.results_in(shorter, tests)
    with pytest.raises(ValueError, match="has no"):
        attacks.with_tables("a page without the marks", made)
