"""Every claim with a number in the docs has a test or a benchmark (claims.toml), and is true."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache

import pytest

from benchmarks import figures
from tests.docs import claims, pages
from tests.docs.claims import Claim
from tests.docs.pages import ROOT, Statement

CLAIMS = claims.load()
STATEMENTS = {
    pages.name_of(page): pages.statements(pages.name_of(page), page.read_text())
    for page in pages.PAGES
}


each_page = pytest.mark.parametrize("page", STATEMENTS)


def _claims_of(page: str) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.page == page]


def _where(claim: Claim) -> list[Statement]:
    """The statements that hold the excerpt."""
    return [said for said in STATEMENTS[claim.page] if claim.pattern.search(said.text)]


def test_the_list_names_pages_that_are_there() -> None:
    assert {claim.page for claim in CLAIMS} <= set(STATEMENTS)


@each_page
def test_a_claim_of_the_list_is_in_its_page_once(page: str) -> None:
    wrong = {claim.excerpt: len(_where(claim)) for claim in _claims_of(page)}
    assert {excerpt: times for excerpt, times in wrong.items() if times != 1} == {}


@each_page
def test_each_claim_with_a_number_is_in_the_list(page: str) -> None:
    patterns = [claim.pattern for claim in _claims_of(page)]
    missing = [
        said.text
        for said in STATEMENTS[page]
        if said.is_claim and not any(pattern.search(said.text) for pattern in patterns)
    ]
    told = "\n".join(missing)
    assert not missing, f"add to tests/docs/claims.toml, or take the number out:\n{told}"


@each_page
def test_no_number_of_a_statement_is_outside_of_its_excerpts(page: str) -> None:
    """So that a second number in a sentence does not pass beside the first one."""
    beside = []
    for said in STATEMENTS[page]:
        left, excused = said.text, False
        for claim in _claims_of(page):
            excused |= bool(claim.no_claim and claim.pattern.search(said.text))
            left = claim.pattern.sub("", left)
        if said.is_claim and not excused and pages.holds_a_number(left):
            beside.append(said.text)
    assert not beside, "lengthen the excerpts:\n" + "\n".join(beside)


@each_page
def test_a_claim_has_a_test_a_value_or_a_reason(page: str) -> None:
    for claim in _claims_of(page):
        assert bool(claim.tests or claim.values) != bool(claim.no_claim), claim
        assert not claim.no_claim or claim.no_claim in claims.REASONS, claim
        assert claim.excerpt.count("{}") == len(claim.values), claim
        measured = any(map(claims.is_measured, claim.values))
        assert not measured or claim.run, f"which command makes these figures? {claim}"


@cache
def _tests_in(path: str) -> set[str]:
    """The names of the tests in a file, a method's with its class."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        outer = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(outer + function.name)
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


@each_page
def test_each_named_test_exists(page: str) -> None:
    for claim in _claims_of(page):
        for test in claim.tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), path
            assert name in _tests_in(path), test


@pytest.mark.parametrize("run", sorted({claim.run for claim in CLAIMS if claim.run}))
def test_each_named_benchmark_exists(run: str) -> None:
    program, *words = run.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert (program, words[0]) == ("python", "-m")
        assert importlib.util.find_spec(words[1])


@each_page
def test_a_number_is_the_one_of_the_code_or_of_the_results(page: str) -> None:
    wrong = []
    for claim in _claims_of(page):
        for said in _where(claim):
            found = claim.pattern.search(said.text)
            assert found is not None
            for text, expression in zip(found.groups(), claim.values, strict=True):
                is_ = claims.value(expression)
                if not claims.fits(text, is_, rounded=claims.is_measured(expression)):
                    wrong.append(f"{text} is {is_}: {claim.excerpt}: {expression}")
    assert not wrong, "make figures writes measured figures:\n" + "\n".join(wrong)


# --- command lines ----------------------------------------------------------------------------


def test_each_command_line_is_run_or_has_a_reason() -> None:
    """tests/e2e/test_docs_commands.py runs them."""
    found = [block for page in pages.PAGES for block in pages.blocks_of(page)]
    run = {line for block in found for line in block.lines if line not in block.left_out}
    for block in found:
        for line, reason in block.left_out.items():
            plain = line.partition("#")[0].strip()
            if reason == "elsewhere":
                assert any(plain == other.partition("#")[0].strip() for other in run), line


def test_a_block_says_where_it_runs_or_why_not() -> None:
    text = "```sh\na 1\nb 2  # c\n```\n"
    (block,) = pages.blocks("p", f"<!-- run: coordinator, labs; not run: b 2 (extra) -->\n{text}")
    assert block.places == ("coordinator", "labs")
    assert block.left_out == {"b 2  # c": "extra"}
    (block,) = pages.blocks("p", f"<!-- not run: installs -->\n{text}")
    assert block.places == ()
    assert set(block.left_out) == {"a 1", "b 2  # c"}
    for marker in ("", "<!-- not run: no time -->\n", "<!-- run: labs; not run: b 2 (so) -->\n"):
        with pytest.raises(ValueError, match=r"say where this runs|is no reason"):
            pages.blocks("p", marker + text)


def test_an_output_of_a_page_is_compared_with_what_was_printed() -> None:
    shown = "run 1/20 loss 0.5 … 3.48 s\n…\ntabular-7dc222 finished: 20 by 94d57e368ae9\n"
    (block,) = pages.blocks("p", f"<!-- run: labs -->\n```sh\na\n```\n\n```text\n{shown}```\n")
    assert block.shown == shown
    printed = "\n".join(
        (
            "begin",
            "run 1/20 loss 0.612  rows 3  2 s",
            "run 2/20",
            "tabular-000abc finished: 3 by abc",
        )
    ).replace("by abc", "by 000abc000abc")
    assert pages.as_shown(shown, printed)
    assert not pages.as_shown(shown, printed.replace("finished", "failed"))
    assert not pages.as_shown(shown, printed.replace("loss", "gain"))
    assert not pages.as_shown(shown, printed.replace("begin\nrun 1", "run x"))


# --- the rules themselves ---------------------------------------------------------------------


def test_what_is_a_claim() -> None:
    text = """# Title with 3

It has 2 parts. It has `3` parts, see [that](page4.md). Wait three days.

| head 1 | 2 |
|---|---|
| row 5 | x |
| Python 3.11 | y |

<!-- figures of make bench -->
| 7 | 8 |
<!-- end of figures -->

- **4. An item** of a
  list, twice.

```sh
commonweight run --rounds 9
```
"""
    found = pages.statements("page", text)
    assert [said.text for said in found if said.is_claim] == [
        "It has 2 parts.",
        "Wait three days.",
        "| row 5 | x |",
        "An item** of a list, twice.",
    ]
    assert "It has `3` parts, see [that](page4.md)." in [said.text for said in found]


@pytest.mark.parametrize(
    ("shown", "value", "rounded", "fit"),
    [
        ("0.031", 0.0312, True, True),
        ("0.031", 0.0316, True, False),
        ("180", 176.0, True, True),
        ("180", 170.0, True, False),
        ("179", 178.4, True, False),
        ("2,000", 2000, False, True),
        ("2,000", 2001, False, False),
        ("1/34", 1 / 33.8, True, True),
        ("a 34th", 1 / 33.8, True, True),
        ("a sixth", 7.2 / 41, True, True),
        ("a sixth", 1 / 7, True, False),
        ("three", 3, False, True),
        ("three", 4, False, False),
        (".948", 0.9483, True, True),
        ("0", 0.4, True, True),
        ("0", 1, False, False),
    ],
)
def test_a_shown_number_fits_its_value(shown: str, value: float, rounded: bool, fit: bool) -> None:
    assert claims.fits(shown, value, rounded=rounded) is fit
    assert re.fullmatch(claims.NUMBER, shown, re.IGNORECASE)


@pytest.mark.parametrize(
    ("shown", "value", "text"),
    [
        ("0.031", 0.0289, "0.029"),
        ("2,000", 3100, "3,100"),
        (".94", 0.951, ".95"),
        ("1/6", 0.2, "1/5"),
    ],
)
def test_a_new_figure_is_written_in_the_form_of_the_old(
    shown: str, value: float, text: str
) -> None:
    assert claims.written(shown, value) == text
    with pytest.raises(ValueError, match="by hand"):
        claims.written("a sixth", 0.25)


def test_a_measured_number_is_written_into_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"rows": [{"name": "a", "s": 0.0289}, {"name": "b", "s": 41.7}]}
    monkeypatch.setattr(claims, "results", lambda file: found)
    takes = "x.json: one(rows, 's', name='{}')"
    listed = [
        Claim("p", "takes {} s and {} s", values=(takes.format("a"), takes.format("b"))),
        Claim("p", "a port is {}", values=("coordinator.storage.settings: PORT",)),
        Claim("p", "{} of it", values=("x.json: 0.25",)),
        Claim("p", "gone {}", values=("x.json: 1",)),
    ]
    text = "It takes 0.031 s\nand 41.1 s. A port is 1. A sixth of it."
    text, by_hand = figures.with_numbers(text, listed)
    assert text == "It takes 0.029 s\nand 41.7 s. A port is 1. A sixth of it."
    assert [what.split(":")[0] for what in by_hand] == ["{} of it", "not found"]
