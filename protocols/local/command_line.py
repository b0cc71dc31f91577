"""Additions of both programs to Typer: help in sections, folded groups, old spellings,
`--help-all`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import click
import typer
import typer.core
import typer.main
from typer.core import TyperCommand, TyperGroup

from protocols import VERSION
from protocols.local.cli_entry import print_line, print_text

#: Arguments of `app add` of both programs.
AppFolder = Annotated[Path, typer.Argument(help="The app's folder, with its pyproject.toml.")]
AppPython = Annotated[
    str, typer.Option(help="The Python that has the app's packages, and commonweight.")
]
AppWrite = Annotated[
    list[str] | None,
    typer.Option(help="A folder, such as a cache of data sets, that it may change."),
]
#: The panel of options that only `--help-all` shows.
MORE = "More options"
_RANGE = re.compile(r"(?:(-?[\d.e-]+)<=?)?x(?:([<>])=(-?[\d.e-]+))?(?=\])")

#: Limits that say nothing beside a default, and "required", which the usage line shows.
_OBVIOUS = re.compile(r"(?<=[^\[]); [01] or more\]|(?:; |\[)required\]")

# Typer escapes "[default: 10]" for rich even in help that is plain text.
typer.core.HAS_RICH = False


class _Argument(typer.core.TyperArgument):
    """An argument that keeps its help, which Typer 0.20 loses with click 8.5."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.help = given.get("help")


typer.main.TyperArgument = _Argument  # type: ignore[attr-defined]


class Command(TyperCommand):
    """A command. Options in the panel MORE are in the help of `--help-all` alone."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if any(map(_is_rare, self.params)) and self.params[-1].name != "help_all":
            count = sum(isinstance(one, click.Option) and not one.hidden for one in self.params)
            self.params.append(_flag("--help-all", f"Show all {count} options.", _show_all))
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if _is_rare(param) and not ctx.meta.get(MORE):
                continue
            if record := _help_record(param, ctx):
                kind = "Arguments" if isinstance(param, click.Argument) else "Options"
                sections.setdefault(MORE if _is_rare(param) else kind, []).append(record)
        for title in ("Arguments", "Options", MORE):
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: `format_options` has written them, with every version of click."""


class Group(TyperGroup):
    """A group of commands.

    `sections`: the commands in help by the title of their section; others are hidden. Without
    sections, all are shown. `folded`: groups whose commands follow the name of another command.
    `moved`: the new spelling of a command, by its old one, which still works.
    """

    sections: ClassVar[Mapping[str, Sequence[str]]] = {}
    folded: ClassVar[Mapping[str, str]] = {}
    moved: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        listed = {name for names in self.sections.values() for name in names}
        for name, command in self.commands.items():
            command.hidden = command.hidden or (bool(self.sections) and name not in listed)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        inner = self.commands.get(self.folded.get(args[0], ""))
        if isinstance(inner, click.Group) and args[1:2] and args[1] in inner.commands:
            return args[0], inner, args[1:]
        name, command, rest = super().resolve_command(ctx, args)
        if name and name in self.moved and not ctx.resilient_parsing:
            print_line(f"note: this command is now: {self.moved[name]}")
        return name, command, rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [_help_record(one, ctx) for one in self.get_params(ctx)]
        if shown := [record for record in records if record]:
            with formatter.section("Options"):
                formatter.write_dl(shown)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        visible = {name: one for name, one in self.commands.items() if not one.hidden}
        limit = formatter.width - 6 - max(map(len, visible), default=0)
        for title, names in (self.sections or {"Commands": list(visible)}).items():
            with formatter.section(title):
                formatter.write_dl(
                    # `simulate` is there only in the program of all packages.
                    [
                        (name, visible[name].get_short_help_str(limit))
                        for name in names
                        if name in visible
                    ]
                )


class App(typer.Typer):
    """Typer whose groups and commands are those of this module."""

    def __init__(
        self,
        *,
        sections: Mapping[str, Sequence[str]] | None = None,
        folded: Mapping[str, str] | None = None,
        moved: Mapping[str, str] | None = None,
        **given: Any,
    ) -> None:
        fields = {"sections": sections or {}, "folded": folded or {}, "moved": moved or {}}
        given.setdefault("no_args_is_help", True)
        super().__init__(
            cls=type("Group", (Group,), fields),
            # click itself names similar commands, since 8.4
            suggest_commands=not hasattr(click.exceptions, "NoSuchCommand"),
            rich_markup_mode=None,
            pretty_exceptions_enable=False,  # a panel of many lines fills a daemon's log
            pretty_exceptions_show_locals=False,
            **given,
        )

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **given: Any
    ) -> Callable[[Any], Any]:
        return super().command(name, cls=cls or Command, **given)


def add_version(app: App) -> None:
    """Add --version, for a program that is called without a command."""

    @app.callback(invoke_without_command=True)
    def root(
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if version:
            print_text(VERSION)
            raise typer.Exit


def _is_rare(param: click.Parameter) -> bool:
    return getattr(param, "rich_help_panel", None) == MORE


def _help_record(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    """The lines of a parameter in the help: numbers and their limits in words."""
    is_number = isinstance(param.type, click.types.IntParamType | click.types.FloatParamType)
    if is_number and isinstance(param, click.Option) and not param.count:
        param.metavar = param.metavar or "NUMBER"
    record: tuple[str, str] | None = param.get_help_record(ctx)
    if record is None:
        return None
    return record[0], _OBVIOUS.sub("]", _RANGE.sub(_limits, record[1])).replace("  ]", "")


def _limits(found: re.Match[str]) -> str:
    """`0<=x<=9` as `0 to 9`, and `x>=1` as `1 or more`."""
    least, sign, bound = found.groups()
    if not bound:
        return found[0]
    if least:
        return f"{float(least):g} to {float(bound):g}"
    return f"{float(bound):g} or {'more' if sign == '>' else 'less'}"


def _flag(name: str, text: str, callback: Callable[..., Any]) -> click.Option:
    return click.Option(
        [name], is_flag=True, is_eager=True, expose_value=False, help=text, callback=callback
    )


def _show_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[MORE] = True
        click.echo(ctx.get_help())
        ctx.exit()
