"""`commonweight doctor`, and `commonweight admin audit`, `backup` and `restore`."""

from __future__ import annotations

import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.common import Json, print_json, print_line, print_result
from coordinator.cli.names import complete_peers
from protocols.errors import CommonweightError, UsageError
from protocols.local import homes
from protocols.local.command_line import App
from protocols.local.durations import parse_seconds

audit = App(help="Show who joined, was removed or refused.", no_args_is_help=False)


def add_to(app: typer.Typer) -> None:
    app.add_typer(audit, name="audit")
    app.command("backup")(backup)
    app.command("restore")(restore)


def add_doctor_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(json: Json = False) -> None:
    """Check this coordinator. The exit status is 6 if a check finds a fault."""
    from coordinator.admin.doctor import examine_coordinator
    from protocols.local import cli_entry

    cli_entry.print_checks(examine_coordinator(homes.home_path("coordinator")), json=json)


PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="A file whose first line is the passphrase; without it you are asked."),
]


def read_passphrase(file: Path | None, *, new: bool, what: str = "") -> str:
    """The passphrase, of `what`, from a file or the terminal. Raises UsageError.

    It is never an argument: everybody on the machine can read the command line.
    """
    if file is None:
        of = f" of {what}" if what else ""
        if not sys.stdin.isatty():
            option = "--new-passphrase-file FILE" if what and new else "--passphrase-file FILE"
            raise UsageError(f"there is no terminal to ask for the passphrase{of}", option)
        return str(
            typer.prompt(f"passphrase{of}", hide_input=True, confirmation_prompt=new, err=True)
        )
    try:
        return file.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "it is not text"
        raise UsageError(
            f"cannot read the passphrase in {file}: {why}",
            "name a text file whose first line is the passphrase",
        ) from err


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """The path of an unencrypted backup in a private folder, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=folder) as private:
        yield Path(private) / "backup"


def backup(
    file: Annotated[Path, typer.Argument(help="Where to write the backup.")],
    with_versions: Annotated[
        bool, typer.Option("--with-versions", help="Include the shared weights on this disk.")
    ] = False,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt with a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Back up keys, peers, settings and the ledger. The coordinator may be running.

    The file contains the coordinator's keys: without --encrypt, anyone who can read it has them.
    """
    from coordinator.admin import backup as backups
    from coordinator.admin import encryption

    home = homes.open_home("coordinator")
    encrypt = encrypt or passphrase_file is not None
    if encrypt:
        passphrase = read_passphrase(passphrase_file, new=True)
        with _temporary_file(home) as plain:
            manifest = backups.write(home, plain, with_versions=with_versions)
            encryption.seal(plain, file, passphrase)
        advice = "without the passphrase nobody can open it, not even you"
    else:
        manifest = backups.write(home, file, with_versions=with_versions)
        advice = "keep it where only you can read it: it contains the coordinator's keys"
    entries, nbytes = manifest.entries, sum(one.nbytes for one in manifest.files.values())
    data = {"file": file, "fleet": manifest.fleet, "entries": entries, "head": manifest.head}
    text = f"wrote {file}: {entries} entries of the ledger, {nbytes / 1e6:,.1f} MB in all"
    print_result(data, f"{text}\n{advice}", json=json)


def restore(
    file: Annotated[Path, typer.Argument(help="A backup.")],
    from_peers: Annotated[
        bool,
        typer.Option("--from-peers", help="Get the newest versions from the agents' disks."),
    ] = False,
    replica: Annotated[
        bool,
        typer.Option(
            "--replica", help="Only keys and settings; the ledger is the one in the database."
        ),
    ] = False,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Restore a coordinator from a backup on this machine. The home must be empty."""
    from coordinator.admin import backup as backups
    from coordinator.admin import encryption

    home = homes.home_path("coordinator")
    if replica and from_peers:
        raise UsageError("a replica asks no peers: others lead", "leave out --from-peers")
    read = partial(backups.restore, home=home, from_peers=from_peers, replica=replica)
    if encryption.is_sealed(file):
        passphrase = read_passphrase(passphrase_file, new=False)
        home.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(home.parent) as plain:
            encryption.unseal(file, plain, passphrase)
            manifest = read(plain)
    else:
        manifest = read(file)
    if json:
        entries = manifest.entries
        data = {"home": home, "fleet": manifest.fleet, "entries": entries, "made_at": manifest.at}
        print_json(data)
        return
    if replica:
        print_line("restored the keys and settings; the ledger is the one in the database")
        print_line("next, on this machine: commonweight up --replica")
        return
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.at))
    print_line(f"restored {home} as it was on {at}, without open tickets")
    print_line(
        "members that were removed since then are members again: "
        "commonweight peers list, commonweight admin operators list"
    )
    if not from_peers and not any(name.startswith("versions/") for name in manifest.files):
        print_line("it contains no shared weights: --from-peers gets them from the agents")
    print_line("next: commonweight up, under the address that the agents know")


@audit.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    peer: Annotated[
        str, typer.Option(help="Only this machine (id or name).", autocompletion=complete_peers)
    ] = "",
    since: Annotated[str, typer.Option(help="2h, 7d, 2026-11-23 or 2026-11-23T18:00.")] = "",
    json: Json = False,
) -> None:
    """Show who joined, was approved, removed or refused, and which runs started and ended."""
    if context.invoked_subcommand is not None:
        return
    from coordinator.admin.audit import read_audit
    from coordinator.storage import ledger_place
    from protocols.messages.envelope import strip_controls

    after = parse_time(since, time.time()) if since else 0.0
    with ledger_place.reading(homes.open_home("coordinator")) as ledger:
        entries = read_audit(ledger, peer=peer, since=after)
    if json:
        print_json(entries)
    elif not entries:
        print_line("there are no such entries")
    else:
        for entry in entries:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
            text = strip_controls(entry.text)
            sys.stdout.write(f"{entry.seq:6} {at} {entry.event:14} {text}\n")


def parse_time(text: str, now: float) -> float:
    """Unix s of a date, of a date with a local time, or of a duration ago. Raises UsageError."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        pass
    try:
        return now - parse_seconds(text)
    except UsageError as err:
        raise UsageError(
            f"{text!r} is not a time", "write 2h, 7d, 2026-11-23 or 2026-11-23T18:00"
        ) from err


@audit.command("verify")
def verify(
    heads: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of `commonweight-agent ledger audit heads`, from other machines."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Verify the ledger's hash chain. Compare it with what agents have seen of it.

    A ledger that was rewritten or cut off contradicts their heads, and the first entry is named.
    """
    from coordinator.admin import countersignatures
    from coordinator.storage import ledger_place, settings

    home = homes.open_home("coordinator")
    keys = settings.open_keys(home)
    with ledger_place.reading(home) as ledger:
        changed, newest = ledger.verify(), ledger.newest()
        if changed is not None:
            raise CommonweightError(
                f"entry {changed} was changed, or one before it is missing",
                "restore ledger.db from a backup; do not trust the entries after that one",
            )
        seen = list(countersignatures.stored(home, ledger))
        for file in heads or []:
            seen += countersignatures.from_file(file, keys.ca_pem)
        compared = countersignatures.compare(ledger, seen)
    if compared.contradicting:
        raise CommonweightError(
            f"the ledger was rewritten, or is another one: {compared.contradicting[0]}"
            + (
                f" ({len(compared.contradicting)} such heads)" if compared.contradicting[1:] else ""
            ),
            "do not trust this ledger; a backup from before that time has the entries",
        )
    count, head = (newest.seq, newest.hash.hex()) if newest else (0, "")
    if json:
        print_json({"entries": count, "head": head, **compared._asdict()})
        return
    sys.stdout.write(f"{count} entries, every hash fits; the last is {head or 'none'}\n")
    sys.stdout.write(f"{compared.agreeing} heads that agents have seen agree with it\n")
    for text in compared.explained:
        sys.stdout.write(f"explained: {text}\n")
