"""What README.md and docs/*.md say: their sentences, which of these make a claim with a number,
and their command lines.

A *statement* is one sentence of a paragraph or of a list item, or one row of a table. Headings,
code blocks, comments, heads of tables and what a program writes between marks are none. It makes a
claim if it holds a digit or a number word, outside of inline code, of targets of links and of the
NAMES below. These are the whole rules.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
#: docs/run-options.md is written from the code as a whole (test_docs.py).
PAGES = (
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "run-options.md"),
)
#: Names and fixed phrases that hold a number and state none.
NAMES = (
    *(
        r"Python 3\.\d+",
        r"Flower 1\.41",
        r"OpenFL 1\.9",
        r"TLS 1\.3",
        r"MQTT 3\.1\.1",
        r"SHA-256",
        r"WSL 2",
    ),
    *(r"Apache-2\.0", r"AES-256-GCM", r"ISO 8601", r"Java 17", r"ResNet-18", r"x86_64"),
    *(r"127\.0\.0\.1", r"\b2NN", r"int8", r"bf16", r"fp16", r"fp32", r"UTF-8", r"[Rr]ound [01]\b"),
    *(r"\[n, \d+(, \d+)?\]", r"float32", r"uint8", r"int64", r"et al\. \d{4}"),
)
#: Number words and what they are; "one", "once", "first" and "second" mostly count nothing.
WORDS = {
    word: float(number)
    for number, word in enumerate(
        (
            *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
            *("twelve", "thirteen", "fourteen", "fifteen"),
        ),
        start=2,
    )
} | {"twenty": 20, "hundred": 100, "thousand": 1000, "twice": 2, "tenfold": 10, "fourfold": 4}
PARTS = {
    name: 1 / number
    for number, name in enumerate(
        ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth"), start=2
    )
}
_NUMBER = re.compile(rf"\d|\b(?:{'|'.join((*WORDS, *PARTS))})\b", re.IGNORECASE)
_NAME = re.compile("|".join(NAMES))
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- (figures|attacks)\b.*?<!-- end of \1 -->", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HIDDEN = re.compile(r"`[^`\n]*`|(?<=\])\([^)]*\)")
_BLOCK_END = re.compile(r"\n\s*\n|\n(?=[-|>] ?|\d+\. )")
_HEAD = re.compile(r"^\|.*\n(?=\|[-| ]+$)", re.MULTILINE)
_LIST = re.compile(r"^(?:> ?|- |\**\d+\. )+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"*)]* +(?=[\"A-Z*`\[!])")


class Statement(NamedTuple):
    page: str
    text: str
    is_claim: bool


#: Why command lines are not run by tests/e2e/test_docs_commands.py.
NOT_RUN = {
    "installs": "changes the machine that runs the tests, or downloads packages",
    "walk-through": "tests/e2e/test_readme.py follows it on machines with the wheel",
    "elsewhere": "another block runs the same line",
    "extra": "needs the packages of an extra: tests/extras",
    "network": "needs another network, proxy or server: tests/e2e/test_proxies.py and others",
    "fleets": "needs a second fleet: tests/e2e/test_hierarchy.py",
    "benchmark": "takes minutes to hours",
    "passphrase": "asks for a passphrase in a terminal: tests/coordinator/admin",
    "ids": "needs the ids of other owners' machines: tests/e2e/test_secure_agents.py",
    "stopped": "needs a stopped coordinator: tests/hostile/test_ca_rotation.py",
    "asked": "answers a question that waits: tests/e2e/test_analyze.py",
    "disk lost": "replaces a coordinator whose disk is lost: tests/coordinator/admin",
}


class Block(NamedTuple):
    """A block of command lines, with what the comment before it says:

    `<!-- run: PLACES -->`, `<!-- not run: REASON -->`, or
    `<!-- run: PLACES; not run: PART OF A LINE (REASON); … -->`. `left_out`: reasons by line.
    `shown`: the output of one of the lines, as the page has it in the block after this one.
    """

    page: str
    places: tuple[str, ...]
    lines: tuple[str, ...]
    left_out: dict[str, str]
    shown: str = ""


def python_in(text: str) -> str:
    """The Python of a page as one program: its blocks continue one another."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def statements(page: str, text: str) -> list[Statement]:
    """The statements of a page, without line breaks."""
    for left_out in (_GENERATED, _FENCE, _COMMENT, _HEAD):
        text = left_out.sub("\n", text)
    found = []
    for block in _BLOCK_END.split(text):
        joined = _LIST.sub("", " ".join(block.split()))
        if not joined or joined.startswith("#") or set(joined) <= set("|- "):
            continue
        for sentence in [joined] if joined.startswith("|") else _sentences(joined):
            found.append(Statement(page, sentence, holds_a_number(sentence)))
    return found


def holds_a_number(text: str) -> bool:
    """True if the text holds a number outside of inline code, targets of links and NAMES."""
    return bool(_NUMBER.search(_NAME.sub("", _masked(text))))


def _masked(text: str) -> str:
    """The text, with inline code and targets of links replaced by as many other characters."""
    return _HIDDEN.sub(lambda found: f"`{'x' * (len(found[0]) - 2)}`", text)


def _sentences(text: str) -> list[str]:
    ends = [0, *(found.end() for found in _SENTENCE_END.finditer(_masked(text))), len(text)]
    return [text[start:end].strip() for start, end in itertools.pairwise(ends)]


_SH = re.compile(
    r"(?:^<!-- ((?:not )?run: [^\n]*?) -->\n)?^```sh\n(.*?)^```(?:\n\n```text\n(.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
#: In an output that a page shows: an id or digest, a number, something left out, space.
_VARIES = re.compile(r"(?P<id>\b[0-9a-f]{6}(?:[0-9a-f]{6})?\b)|(?P<number>\d+(?:\.\d+)?)|…|\s+")


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of command lines of a page; a continued line is one line. Raises ValueError for
    a block without a comment, or with one that cannot be read."""
    return [_block(page, marker, body, shown) for marker, body, shown in _SH.findall(text)]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a file."""
    return blocks(name_of(page), page.read_text())


def as_shown(shown: str, printed: str) -> bool:
    """True if the output has the lines that a page shows, with ids and numbers of its own."""
    lines = [
        r"(?:.*\n)*?" if line.strip() == "…" else _line_pattern(line) for line in shown.splitlines()
    ]
    return re.search("^" + "".join(lines), printed + "\n", re.MULTILINE) is not None


def _line_pattern(line: str) -> str:
    pieces, end = [], 0
    for found in _VARIES.finditer(line.rstrip()):
        pieces.append(re.escape(line[end : found.start()]))
        if found["id"]:
            pieces.append(rf"[0-9a-f]{{{len(found['id'])}}}")
        elif found["number"]:
            pieces.append(r"\d+(?:\.\d+)?")
        else:
            pieces.append(".*" if found[0] == "…" else r"\s+")
        end = found.end()
    return "".join(pieces) + re.escape(line[end:].rstrip()) + r"[^\S\n]*\n"


def _block(page: str, marker: str, body: str, shown: str) -> Block:
    whole = re.sub(r"\\\n", " ", body)
    lines = tuple(line for line in whole.splitlines() if line.strip() and line[0] != "#")
    run, _, rest = marker.partition("not run: ")
    if not rest:
        reasons = {}
    elif not run:
        reasons = dict.fromkeys(lines, rest)
    else:
        reasons = {}
        for part, reason in re.findall(r"([^;]+?) \((.+?)\)(?:; |$)", rest):
            here = [line for line in lines if part in line]
            if not here:
                raise ValueError(f"{page}: no line holds {part!r}")
            reasons |= dict.fromkeys(here, reason)
    places = tuple(re.findall(r"[\w-]+", run.removeprefix("run:")))
    if not places and set(reasons) != set(lines):
        raise ValueError(f"{page}: say where this runs, or why not: {lines}")
    if unknown := set(reasons.values()) - set(NOT_RUN):
        raise ValueError(f"{page}: {unknown} is no reason; known are {sorted(NOT_RUN)}")
    return Block(page, places, lines, reasons, shown)
