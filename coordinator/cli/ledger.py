"""`commonweight admin ledger`: where the ledger is, and how it moves to a database and back."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from coordinator.cli.common import Json, print_result
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.command_line import App

ledger = App(help="Move the ledger to PostgreSQL and back.")


@ledger.command("move")
def move(
    to: Annotated[
        str,
        typer.Option(
            help="postgresql://user@host/database without a password, or `file` for ledger.db in "
            "the home."
        ),
    ],
    json: Json = False,
) -> None:
    """Move the ledger to a database, or back to a file. The coordinator must be stopped.

    Every hash is checked. If it fails, the ledger stays where it is.
    """
    from coordinator.admin import ledger_move

    moved = ledger_move.move(homes.open_home("coordinator"), to)
    text = f"moved {moved.entries} entries to {moved.place}; the last is {moved.head or 'none'}"
    print_result(moved, f"{text}\nnext: commonweight up", json=json)


@ledger.command("schema")
def schema(
    grant: Annotated[
        str, typer.Option(help="Also give this role the rights that a coordinator needs.")
    ] = "",
) -> None:
    """Print the SQL of the tables in the database.

    With --grant, the role of the coordinator can add entries, and neither change nor delete them.
    """
    from coordinator.storage import postgres_session

    if grant and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", grant):
        raise UsageError(f"{grant!r} is not the name of a role", "such as commonweight")
    sys.stdout.write(postgres_session.TABLES.lstrip())
    if grant:
        sys.stdout.write(postgres_session.GRANTS.format(role=grant))
