"""`commonweight admin keys`: which keys this coordinator has, and how to replace them."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from coordinator.cli.admin import PassphraseFile, read_passphrase
from coordinator.cli.common import Json, print_result
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.command_line import App

keys = App(help="Show and replace the coordinator's keys.")


class _Key(StrEnum):
    SIGNING = "signing"
    OPERATOR = "operator"
    ISSUER = "issuer"
    CA = "ca"


_WHAT_NEXT = {
    _Key.SIGNING: "start the coordinator: commonweight up. Agents take the new key at their next "
    "session and then refuse the old one. Make a new backup: an old backup has the old key",
    _Key.OPERATOR: "start the coordinator: commonweight up. Commands on this machine use the new "
    "key; joined operators keep theirs (remove one with commonweight admin operators remove)",
    _Key.ISSUER: "put the CA's key away again, and start the coordinator: commonweight up. After "
    "their next session, agents refuse fleet cards of the old issuer",
    _Key.CA: "start the coordinator: commonweight up. Agents, monitors and operators follow by "
    "themselves; commonweight admin keys status shows who has not yet. Earlier tickets are no "
    "longer valid. Make a new backup, and delete the old CA's key wherever it is kept. "
    "Restart Mosquitto, if it is your broker",
}


@keys.command()
def status(json: Json = False) -> None:
    """Show the keys as short hashes, and how long the certificates last."""
    from coordinator.admin import keys as admin

    found = admin.read_status(homes.open_home("coordinator"))
    card = f"fleet card {found.card}" if found.card else "no fleet card yet"
    card += "" if found.is_announced else "; `commonweight up` makes one with this key"
    replaced = f"; replaced {found.ca_rotations} times" if found.ca_rotations else ""
    text = (
        f"fleet     {found.fleet}\n"
        f"CA        {found.ca}  {found.ca_days:.0f} days left{replaced}\n"
        + (f"issuer    {found.issuer_days:.0f} days left\n" if found.issuer_days else "")
        + f"TLS       {found.tls_days:.0f} days left; renewed automatically\n"
        f"signing   {found.signing}  {card}\n"
        f"operator  {found.operator}"
    )
    if found.behind:
        text += f"\nnot come since the new CA: {', '.join(found.behind)}"
    elif found.ca_rotations:
        text += "\nall machines and accesses use the new CA"
    if found.old_ca_until:
        until = time.strftime("%Y-%m-%d", time.localtime(found.old_ca_until))
        text += f"\ncertificates of the old CA count until {until}, or until all machines have come"
    print_result(msgspec.structs.asdict(found), text, json=json)


@keys.command()
def rotate(
    key: Annotated[
        _Key, typer.Argument(help="signing: of commands and versions; operator; issuer; ca.")
    ],
    ca_key: Annotated[
        Path | None, typer.Option(help="For issuer and ca: the file with the CA's offline key.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    offline_ca: Annotated[
        Path | None,
        typer.Option(help="For ca: write the new CA's key to this file, encrypted."),
    ] = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="For ca: a file with the passphrase of the new CA's key.")
    ] = None,
    old_days: Annotated[
        float | None,
        typer.Option(help="For ca: how many days certificates of the old CA count."),
    ] = None,
    json: Json = False,
) -> None:
    """Replace a key, for example after a leak. The coordinator must be stopped."""
    from coordinator.admin import keys as admin
    from coordinator.storage import settings
    from protocols.enrollment.ca_chain import OLD_CA_DAYS

    home = homes.open_home("coordinator")
    for given, option, fits in (
        (ca_key, "--ca-key", (_Key.ISSUER, _Key.CA)),
        (passphrase_file, "--passphrase-file", (_Key.ISSUER, _Key.CA)),
        (offline_ca, "--offline-ca", (_Key.CA,)),
        (new_passphrase_file, "--new-passphrase-file", (_Key.CA,)),
        (old_days, "--old-days", (_Key.CA,)),
    ):
        if given is not None and key not in fits:
            raise UsageError(f"{option} is not for the {key.value} key", "leave it out")
    if key is _Key.CA and ca_key is None and passphrase_file is not None:
        raise UsageError("--passphrase-file is for the old CA's key", "add --ca-key FILE")
    if offline_ca is None and new_passphrase_file is not None:
        raise UsageError("--new-passphrase-file is for the new CA's key", "add --offline-ca FILE")
    if key is _Key.SIGNING or key is _Key.OPERATOR:
        digest = admin.rotate(home, "signing" if key is _Key.SIGNING else "operator")
    elif key is _Key.CA:
        found = settings.open_keys(home)
        admin.check_ca_options(found, has_old=ca_key is not None, is_offline=offline_ca is not None)
        old = keep = None
        if ca_key is not None:
            old = ca_key, read_passphrase(passphrase_file, new=False, what="the old CA's key")
        if offline_ca is not None:
            word = read_passphrase(new_passphrase_file, new=True, what="the new CA's key")
            keep = admin.write_encrypted(offline_ca, word)
        days = OLD_CA_DAYS if old_days is None else old_days
        digest = admin.rotate_ca(home, old=old, keep_offline=keep, old_days=days)
    else:
        admin.check_issuer(settings.open_keys(home), has_ca_key=ca_key is not None)
        assert ca_key is not None
        digest = admin.rotate_issuer(home, ca_key, read_passphrase(passphrase_file, new=False))
    name = "CA's" if key is _Key.CA else key.value
    text = f"the new {name} key is {digest}\nnext: {_WHAT_NEXT[key]}"
    print_result({"key": key.value, "sha256": digest}, text, json=json)
