"""Helpers of both command lines: exit codes, output, reading a ticket, the checks of a doctor.

click is imported inside the functions, because a running coordinator or agent does not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protocols.errors import CommonweightError, ExitCode, UsageError
from protocols.local import checks, json_output

#: Click's names of types, and plain ones.
_PLAIN_WORDS = {
    "a valid integer range": "a whole number",
    "a valid integer": "a whole number",
    "a valid float range": "a number",
    "a valid float": "a number",
}


def run(command: Callable[..., Any]) -> int:
    """Run a command with `sys.argv`; return its exit status.

    Prints a CommonweightError as message and hint, or with --json as one line of JSON.
    """
    import click

    try:
        result = command(standalone_mode=False)
    except CommonweightError as err:
        if "--json" in sys.argv:
            sys.stdout.write(json_output.error(err) + "\n")
        else:
            print_line(json_output.format_error(err))
        return int(err.exit_code)
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        return int(ExitCode.INTERRUPTED)
    except click.ClickException as err:
        for words, plain in _PLAIN_WORDS.items():
            err.message = err.message.replace(words, plain)  # type: ignore[misc]
        err.show()
        return int(ExitCode.USAGE)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    return result if isinstance(result, int) else 0


def read_ticket(given: str) -> str:
    """The ticket given as text, as `file:PATH`, or as `-` for standard input. Raises UsageError."""
    if given == "-":
        if sys.stdin.isatty():
            import click

            return str(click.prompt("ticket", hide_input=True, err=True))
        if text := sys.stdin.read().strip():
            return text
        raise UsageError(
            "there is no ticket on standard input", "give it there, or name it: file:PATH"
        )
    if given.startswith("file:"):
        path = Path(given.removeprefix("file:")).expanduser()
        try:
            return path.read_text()
        except OSError as err:
            raise UsageError(f"cannot read the ticket in {path}: {err.strerror}") from err
        except UnicodeDecodeError as err:
            raise UsageError(f"{path} is not a ticket: it is not text") from err
    return given


def print_line(text: str) -> None:
    """Print a line for a person, to stderr; control characters of peers as `·`."""
    sys.stderr.write(printable(text) + "\n")


def print_text(text: str) -> None:
    """Print lines for a person, to stdout; control characters of peers as `·`."""
    sys.stdout.write(printable(text) + "\n")


def printable(text: str) -> str:
    """The text without control characters but line feeds."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def print_json(data: Any) -> None:
    """Print one line of JSON, to stdout."""
    sys.stdout.write(json_output.ok(data) + "\n")


def print_result(data: Any, text: str, *, json: bool) -> None:
    """Print `data` as a line of JSON, or `text` for a person."""
    if json:
        print_json(data)
    else:
        print_line(text)


def print_checks(found: Iterable[checks.Check], *, json: bool) -> None:
    """Print each check as soon as it has run. Exits with status 6 if one failed."""
    import click

    done = []
    for check in found:
        done.append(check)
        if not json:
            sys.stdout.write(checks.format_check(check) + "\n")
            sys.stdout.flush()
    if json:
        print_json({"faults": checks.count_failed(done), "checks": done})
    if checks.count_failed(done):
        raise click.exceptions.Exit(ExitCode.FAULTS_FOUND)
