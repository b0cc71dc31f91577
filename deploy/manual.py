"""Man pages, from the text of --help: python deploy/manual.py FOLDER"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import typer.main

import agent.cli.main
import commonweight.cli
from protocols import VERSION

PROGRAMS = {"commonweight": commonweight.cli.app, "commonweight-agent": agent.cli.main.app}


class Told(NamedTuple):
    """One command: its words, its help, and each parameter as it is typed and what it is for."""

    words: str
    usage: str
    help: str
    parameters: list[tuple[str, str]]


def root(program: str) -> click.Group:
    """The program's commands, as click has them."""
    found = typer.main.get_command(PROGRAMS[program])
    assert isinstance(found, click.Group)
    return found


def told(program: str) -> Iterator[Told]:
    """The program and every command under it, in the order of --help."""
    yield from _told(click.Context(root(program), info_name=program))


def _told(context: click.Context) -> Iterator[Told]:
    command = context.command
    if command.hidden:
        return
    parameters = [
        record
        for parameter in command.get_params(context)
        if "--help" not in parameter.opts
        and (record := parameter.get_help_record(context)) is not None
    ]
    usage = " ".join(command.collect_usage_pieces(context))
    yield Told(context.command_path, usage, (command.help or "").strip(), parameters)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            assert sub is not None
            yield from _told(click.Context(sub, info_name=name, parent=context))
            inner = command.commands.get(getattr(command, "folded", {}).get(name, ""))
            for below, one in inner.commands.items() if isinstance(inner, click.Group) else ():
                yield from _told(click.Context(one, info_name=f"{name} {below}", parent=context))


def man_page(program: str) -> str:
    """The page in roff, section 1."""
    first, *commands = list(told(program))
    lines = [
        f'.TH {program.upper()} 1 "" "commonweight {VERSION}"',
        *(".SH NAME", f"{_roff(program)} \\- {_roff(first.help.rstrip('.'))}"),
        *(".SH SYNOPSIS", f".B {_roff(program)}", _roff(first.usage)),
        ".SH COMMANDS",
    ]
    for command in commands:
        lines += [".SS", f"{_roff(command.words)} {_roff(command.usage)}", _roff(command.help)]
        for typed, about in command.parameters:
            lines += [".TP", f".B {_roff(typed)}", _roff(about)]
    lines += [".SH SEE ALSO", "commonweight(1), commonweight-agent(1)"]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Text as it is: nothing in it is a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(
        "\\&" + line if line.startswith((".", "'")) else line for line in escaped.splitlines()
    )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")
    folder.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        (folder / f"{program}.1").write_text(man_page(program))


if __name__ == "__main__":
    main()
