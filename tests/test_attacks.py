"""The tables of attacks in docs/attacks.md are those of the tests as they are."""

from __future__ import annotations

from tests import attacks

TESTS = attacks.find_tests()
PAGE = attacks.PAGE.read_text()
RESULTS = attacks.results_in(PAGE, TESTS)
WRITE = "run: .venv/bin/python -m tests.attacks --new"


def test_each_test_of_an_attack_has_a_result_in_the_table() -> None:
    assert [test.node for test in TESTS if test.node not in RESULTS] == [], WRITE


def test_the_tables_say_what_the_tests_say() -> None:
    made = attacks.tables(TESTS, RESULTS)
    wrong = set(attacks.tables_in(PAGE).splitlines()) ^ set(made.splitlines())
    assert attacks.tables_in(PAGE) == made, (WRITE, sorted(wrong)[:10])


def test_no_attack_succeeds() -> None:
    assert [node for node, result in RESULTS.items() if result.startswith(attacks.OPEN)] == []


def test_each_numbered_attack_has_a_test_or_a_reason() -> None:
    tried = {number for test in TESTS if not test.is_control for number in test.numbers}
    silent = [
        n for n, numbered in attacks.NUMBERED.items() if n not in tried and not numbered.reason
    ]
    assert silent == [], "write a test, or a reason into NUMBERED of tests/attacks.py"
