"""`commonweight keys`: which keys this coordinator has, and how to replace them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from coordinator.cli.admin import PassphraseFile, read_passphrase
from coordinator.cli.common import Json, print_result
from protocols.errors import UsageError
from protocols.local import homes

keys = typer.Typer(help="Show and replace the coordinator's keys.", no_args_is_help=True)


class _Key(StrEnum):
    SIGNING = "signing"
    OPERATOR = "operator"
    ISSUER = "issuer"


_WHAT_NEXT = {
    _Key.SIGNING: "start the coordinator: commonweight up. Agents take the new key at their next "
    "session, and refuse the old one then. Make a new backup: an old one has the old key",
    _Key.OPERATOR: "start the coordinator: commonweight up. Commands on this machine use the new "
    "key; joined operators keep theirs (remove one with commonweight operators remove)",
    _Key.ISSUER: "put the CA's key away again, and start the coordinator: commonweight up. Agents "
    "take no fleet card of the old issuer after their next session",
}


@keys.command()
def status(json: Json = False) -> None:
    """Show the keys of this coordinator, as short hashes, and how long its certificates last."""
    from coordinator.admin import keys as admin

    found = admin.read_status(homes.open_home("coordinator"))
    card = f"fleet card {found.card}" if found.card else "no fleet card yet"
    card += "" if found.is_announced else "; `commonweight up` makes one with this key"
    text = (
        f"fleet     {found.fleet}\n"
        f"CA        {found.ca_days:.0f} days left\n"
        + (f"issuer    {found.issuer_days:.0f} days left\n" if found.issuer_days else "")
        + f"TLS       {found.tls_days:.0f} days left; renewed by itself\n"
        f"signing   {found.signing}  {card}\n"
        f"operator  {found.operator}"
    )
    print_result(msgspec.structs.asdict(found), text, json=json)


@keys.command()
def rotate(
    key: Annotated[
        _Key, typer.Argument(help="signing: of commands and versions; operator; issuer.")
    ],
    ca_key: Annotated[
        Path | None, typer.Option(help="For issuer: the file with the CA's key.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Replace a key, for example after a leak. The coordinator must be stopped."""
    from coordinator.admin import keys as admin

    home = homes.open_home("coordinator")
    if key is _Key.SIGNING or key is _Key.OPERATOR:
        digest = admin.rotate(home, "signing" if key is _Key.SIGNING else "operator")
    elif ca_key is None:
        raise UsageError("the CA's key signs a new issuer", "--ca-key FILE, as given to init")
    else:
        digest = admin.rotate_issuer(home, ca_key, read_passphrase(passphrase_file, new=False))
    text = f"the new {key.value} key is {digest}\nnext: {_WHAT_NEXT[key]}"
    print_result({"key": key.value, "sha256": digest}, text, json=json)
