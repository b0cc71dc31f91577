"""Every command line in the docs is one that the programs take; links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer.main
from click.testing import CliRunner

import agent.cli.main
import commonweight.cli
from agent.home.settings_schema import AgentSettings
from benchmarks import figures
from protocols import VERSION
from protocols.local import homes
from tests.docs import pages

ROOT = Path(__file__).parents[2]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = sorted([*(ROOT / name for name in ROOT_PAGES), *(ROOT / "docs").rglob("*.md")])
PROGRAMS: dict[str, click.Command] = {
    "commonweight": typer.main.get_command(commonweight.cli.app),
    "commonweight-agent": typer.main.get_command(agent.cli.main.app),
}
#: The pages that `make docs` makes from the code (deploy/reference.py).
GENERATED = {"reference.md", "reference-api.md", "contributing.md"}
#: Programs that are not ours; what they are asked is theirs.
OTHERS = {
    "curl",
    "mosquitto",
    "pip",
    "python3",
    ".",
    "uv",
    "pipx",
    "helm",
    "kubectl",
    "podman",
    "make",
    "pre-commit",
    "sh",
    "sudo",
    "python",
    "export",
    "git",
}
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:commonweight|commonweight-agent) [^`…]+)`")
_PATH = re.compile(
    r"`((?:agent|commonweight|coordinator|protocols|tests|benchmarks|docs|deploy)/[\w/.-]*)`"
)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def lines() -> list[tuple[str, str, bool]]:
    """(page, command line, whether it is in a block to copy) of each line in the pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        whole = re.sub(r"\\\n", " ", "".join(_BLOCK.findall(text)))
        copied = [line for line in whole.splitlines() if line.strip() and line[0] != "#"]
        found += [(page.name, line, True) for line in copied]
        found += [(page.name, line, False) for line in _INLINE.findall(text)]
    return found


def check(words: list[str]) -> None:
    """Raise unless the program has this command and takes these options. Nothing is run."""
    command = PROGRAMS[words[0]]
    context, rest = click.Context(command, info_name=words[0]), words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no {rest[0]}"
        assert rest[0] not in getattr(command, "moved", {}), f"{rest[0]} is an old spelling"
        name, sub, rest = command.resolve_command(context, rest)
        assert sub is not None
        command, context = sub, click.Context(sub, info_name=name, parent=context)
    if not isinstance(command, click.Group):
        command.make_context(context.info_name, rest, parent=context.parent)
    elif rest:
        command.make_parser(context).parse_args(list(rest))


@pytest.mark.parametrize(("page", "line", "copied"), lines())
def test_a_command_line_is_one_that_is_there(page: str, line: str, copied: bool) -> None:
    words = shlex.split(line, comments=True)
    if words[0].startswith("COMMONWEIGHT_HOME="):
        words = words[1:]
    if words[0] in PROGRAMS:
        try:
            check(words)
        except click.ClickException as err:
            # A sentence may name a command alone.
            if copied or not isinstance(err, click.MissingParameter):
                pytest.fail(f"{page}: {line}: {err.format_message()}")
    else:
        assert words[0] in OTHERS, f"{page}: what is {words[0]}?"
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert target in GENERATED or (page.parent / target).exists(), target


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_to_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        there = page.parent / target if target else page
        assert anchor in slugs(there), f"{target}#{anchor}"


def test_each_page_of_the_docs_is_in_the_navigation() -> None:
    nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    docs = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(nav) == sorted({*docs, *GENERATED})


@pytest.mark.parametrize(
    "line",
    sorted(
        {
            line.partition("#")[0].strip()
            for _, line, _ in lines()
            if line.startswith("commonweight-agent policy set ")
        }
    ),
)
def test_a_policy_that_the_docs_set_can_be_set(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in ("pictures/cat", "letters"):  # paths of the docs, which must exist
        (tmp_path / data).mkdir(parents=True)
        (tmp_path / data / "1.txt").write_text("hello")
    (tmp_path / "points.txt").write_text("1 2\n")
    for table in ("patients.csv", "my_task.csv"):
        (tmp_path / table).write_text("age\n41\n")
    monkeypatch.chdir(tmp_path)
    homes.open_home("agent", create=True)
    line = line.replace("DIGEST", "d" * 64)
    done = CliRunner().invoke(PROGRAMS["commonweight-agent"], shlex.split(line)[1:])
    assert done.exception is None, done.exception
    _, _, key, value, *_ = shlex.split(line)[1:]
    assert f"{key.replace('.', '_')} is {value}" in done.output


_PYTHON = [(page, code) for page in PAGES if (code := pages.python_in(page.read_text()))]


@pytest.mark.parametrize(("page", "code"), _PYTHON, ids=[page.name for page, _ in _PYTHON])
def test_python_in_the_docs_has_the_names_that_it_uses(page: Path, code: str) -> None:
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), str(page), "exec"), {})
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
    done = subprocess.run(ruff, input=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_installed_is_this_version_with_extras_that_exist(page: Path) -> None:
    text = page.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wheel in re.findall(r"commonweight-([\w.]+?)-py3-none-any\.whl", text):
        assert wheel == VERSION
    for named in re.findall(r"(?:commonweight|\.whl|'\.)\[([\w,]+)\]", text):
        assert set(named.split(",")) <= set(extras["optional-dependencies"])
    for row in re.findall(r"^## Which extra.*?^## ", text, re.MULTILINE | re.DOTALL):
        listed = set(re.findall(r"`([\w]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", row, re.M))))
        assert listed == set(extras["optional-dependencies"]) - {"docs", "dev"}


def test_messages_that_the_docs_quote_are_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = re.findall(r'^\| [^|]*"([^"|]+)"[^|]*\|', text, re.MULTILINE)
    folders = (ROOT / "agent", ROOT / "coordinator", ROOT / "protocols")
    code = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert quotes
    for quote in quotes:
        for piece in re.split(r"\d+", quote):  # a number is filled in
            assert piece in code, quote


def test_the_reference_has_every_command_setting_task_method_and_endpoint() -> None:
    sys.path.insert(0, str(ROOT / "deploy"))
    try:
        reference = importlib.import_module("reference")
    finally:
        sys.path.remove(str(ROOT / "deploy"))
    made = reference.generated()
    assert set(made) == GENERATED
    for program in PROGRAMS:
        commands = list(reference.manual.told(program))
        assert len(commands) > 20
        assert all(f"### `{command.words}`" in made["reference.md"] for command in commands)
    assert all(f"| `{name}` |" in made["reference.md"] for name in AgentSettings.__annotations__)
    for line in (
        "def train(weights: Weights, settings: Settings, on_step: OnStep) -> TrainOutcome",
        "def train(task: str | type, **options: Any) -> Run",
        "| GET | `/cw/v1/fleet` | operators and observers |  |",
    ):
        assert line in made["reference-api.md"]
    assert not re.search("object at 0x|ForwardRef|<class", made["reference-api.md"])
    for text in made.values():
        for target in _LINK.findall(text):
            assert target in GENERATED or (ROOT / "docs" / target).exists(), target


def test_the_task_of_the_docs_is_the_example() -> None:
    example = (ROOT / "docs/examples/digits.py").read_text()
    assert f"```python\n{example}```" in (ROOT / "docs/tasks.md").read_text()


def test_what_is_no_command_is_found() -> None:
    with pytest.raises(AssertionError, match="there is no nonsense"):
        check(["commonweight", "nonsense"])
    with pytest.raises(click.ClickException):
        check(["commonweight-agent", "pause", "--until", "2h"])


def test_the_table_of_run_options_is_up_to_date() -> None:
    made = [sys.executable, str(ROOT / "deploy" / "run_options.py")]
    expected = subprocess.run(made, capture_output=True, text=True, check=True, timeout=60).stdout
    assert (ROOT / "docs" / "run-options.md").read_text() == expected, (
        "run: .venv/bin/python deploy/run_options.py > docs/run-options.md"
    )


@pytest.mark.parametrize(("page", "name"), figures.TABLES)
def test_a_table_of_figures_is_that_of_the_results_file(page: str, name: str) -> None:
    text = (ROOT / page).read_text()
    assert figures.with_table(text, name, figures.made(page, name)) == text, "run: make figures"


def test_each_table_of_figures_has_a_results_file() -> None:
    marks = {
        (str(page.relative_to(ROOT)), name)
        for page in PAGES
        for name in re.findall("<!-- figures of (.*?) -->", page.read_text())
    }
    assert marks == set(figures.TABLES)
    with pytest.raises(ValueError, match="no place"):
        figures.with_table("no marks", "make bench", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_that_a_page_names_exists(page: Path) -> None:
    missing = [path for path in _PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("package", ["agent", "commonweight", "coordinator", "protocols"])
def test_a_newcomer_sees_a_package_at_a_glance(package: str) -> None:
    """At most 12 rooms, each with a sign at its door."""
    hidden = ("__init__.py", "__pycache__", "py.typed")
    rooms = [path for path in (ROOT / package).iterdir() if path.name not in hidden]
    assert len(rooms) <= 12
    for sign in (ROOT / package).glob("**/__init__.py"):
        assert ast.get_docstring(ast.parse(sign.read_text())), sign
