"""The help of every command of both programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

from agent.cli.main import app as agent_app
from commonweight.cli import app as coordinator_app
from protocols.local.command_line import MORE

PROGRAMS = {"commonweight": coordinator_app, "commonweight-agent": agent_app}
MAX_ENTRIES = 14

each_program = pytest.mark.parametrize("app", PROGRAMS.values(), ids=PROGRAMS)


def root(app: typer.Typer) -> Any:
    return typer.main.get_command(app)


def contexts(command: Any, *path: str, parent: Any = None) -> Iterator[tuple[Any, Any]]:
    """The words of a command and of all that it contains, each with its context."""
    # click leaves two of a terminal's 80 columns empty.
    context = click.Context(command, parent, path[-1] if path else "root", terminal_width=78)
    yield path, context
    for name, child in getattr(command, "commands", {}).items():
        yield from contexts(child, *path, name, parent=context)


def help_of(app: typer.Typer, *path: str) -> str:
    return str(dict(contexts(root(app)))[path].get_help())


@pytest.fixture(scope="module", params=PROGRAMS.values(), ids=PROGRAMS)
def pages(request: pytest.FixtureRequest) -> dict[tuple[str, ...], str]:
    """Each help page of a program, with all options, by the words of its command."""
    found = {}
    for path, context in contexts(root(request.param)):
        context.meta[MORE] = True
        found[path] = context.get_help()
    return found


def test_help_shows_defaults_without_backslashes(pages: dict[tuple[str, ...], str]) -> None:
    assert len(pages) > 10
    assert all("Usage:" in text for text in pages.values())
    assert any("[default: " in text for text in pages.values())
    assert [path for path, text in pages.items() if "\\[" in text] == []


def test_help_fits_a_terminal_and_shortens_no_sentence(pages: dict[tuple[str, ...], str]) -> None:
    lines = [line for text in pages.values() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if re.fullmatch(r"  \S+ .*\.\.\.", line)] == []


def test_help_is_in_plain_words(pages: dict[tuple[str, ...], str]) -> None:
    found = [path for path, text in pages.items() if re.search(r"x[<>]=|INTEGER|FLOAT", text)]
    assert found == []


@each_program
def test_each_argument_of_a_visible_command_is_explained(app: typer.Typer) -> None:
    bare = [
        (*path, param.name)
        for path, context in contexts(root(app))
        for param in context.command.params
        if isinstance(param, click.Argument) and not param.help
    ]
    assert bare == []


@each_program
def test_the_first_page_is_short_and_starts_with_the_first_steps(app: typer.Typer) -> None:
    text = help_of(app)
    titles = re.findall(r"^(\w.+):$", text, re.MULTILINE)
    assert titles[:2] == ["Options", "First steps"]
    entries = [name for name, one in root(app).commands.items() if not one.hidden]
    assert len(entries) <= MAX_ENTRIES
    listed = re.findall(r"^  ([a-z]\S*)  ", text, re.MULTILINE)
    assert sorted(listed) == sorted(entries)


@each_program
def test_tasks_and_flower_apps_are_found_from_the_first_page(app: typer.Typer) -> None:
    assert re.search(r"^  task .*Flower apps: task app\.$", help_of(app), re.MULTILINE)
    assert re.search(r"^  app  +\w", help_of(app, "task"), re.MULTILINE)
    for words in (["app", "add"], ["task", "app", "add"]):
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_first_steps_come_in_the_order_in_which_they_are_taken() -> None:
    text = help_of(coordinator_app)
    steps = ("demo", "init", "up", "ticket", "run", "monitor", "peers")
    places = [text.index(f"\n  {name} ") for name in steps]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("app", "old", "new"),
    [
        (coordinator_app, ("keys", "rotate"), ("admin", "keys", "rotate")),
        (coordinator_app, ("operators", "list"), ("admin", "operators", "list")),
        (coordinator_app, ("audit", "verify"), ("admin", "audit", "verify")),
        (coordinator_app, ("backup",), ("admin", "backup")),
        (coordinator_app, ("restore",), ("admin", "restore")),
        (coordinator_app, ("mqtt", "mosquitto"), ("admin", "mosquitto")),
        (coordinator_app, ("job", "list"), ("infer", "list")),
        (coordinator_app, ("job", "stop"), ("infer", "stop")),
        (agent_app, ("questions", "allow"), ("policy", "questions", "allow")),
        (agent_app, ("audit", "verify"), ("ledger", "audit", "verify")),
        (agent_app, ("id",), ("status", "id")),
        (agent_app, ("paths",), ("status", "paths")),
        (agent_app, ("serve",), ("models", "serve")),
        (agent_app, ("export",), ("models", "export")),
        (agent_app, ("discover",), ("join",)),
    ],
)
def test_an_old_spelling_still_works_with_a_note(
    app: typer.Typer, old: Sequence[str], new: Sequence[str]
) -> None:
    noted = CliRunner().invoke(app, [*old, "--help"])
    assert noted.exit_code == 0
    assert noted.stderr.startswith(f"note: this command is now: {root(app).name} {new[0]}")
    plain = CliRunner().invoke(app, [*new, "--help"])
    assert (plain.exit_code, plain.stderr) == (0, "")
    assert re.search(rf"^  {old[0]}  ", help_of(app), re.MULTILINE) is None


@pytest.mark.parametrize(("one", "other"), [("up", "run"), ("restart", "restart")])
def test_up_and_run_are_one_command(one: str, other: str) -> None:
    found: Mapping[str, click.Command] = root(agent_app).commands
    places = {"up": found["up"], "restart": root(agent_app).commands["service"].commands["restart"]}
    assert places[one].help == found[other].help
    done = CliRunner().invoke(agent_app, [other, "--help"])
    assert (done.exit_code, done.stderr) == (0, "")


@each_program
@pytest.mark.parametrize("typo", ["polici", "jion", "peer", "docter", "moniter"])
def test_a_misspelled_command_is_suggested_once(app: typer.Typer, typo: str) -> None:
    done = CliRunner().invoke(app, [typo])
    assert done.exit_code == 2
    assert done.stderr.count("Did you mean") <= 1
    assert "No such command" in done.stderr


def test_a_misspelled_command_names_the_right_one() -> None:
    assert "Did you mean 'peers'?" in CliRunner().invoke(coordinator_app, ["peer"]).stderr


def test_join_has_no_options_for_demos_in_its_help() -> None:
    text = help_of(agent_app, "join")
    assert "--part" not in text
    assert "--split" not in text
    command = root(agent_app).commands["join"]
    words = ["TICKET", "--part", "0/4", "--split", "iid"]
    assert command.make_context("join", words).params["part"] == "0/4"
