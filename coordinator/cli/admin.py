"""`commonweight doctor`, `audit`, `backup` and `restore`: how it is, what happened, and safety."""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.common import Json
from coordinator.remote.durations import parse_seconds
from protocols.errors import CommonweightError, UsageError
from protocols.local import homes, json_output

audit = typer.Typer(help="Who was let in, sent away or refused, from the ledger.")


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
    app.add_typer(audit, name="audit")
    app.command("backup")(backup)
    app.command("restore")(restore)


def doctor(json: Json = False) -> None:
    """Look for what keeps this coordinator from working. Exit status 6 when something does."""
    from coordinator.admin.doctor import examine_coordinator
    from protocols.local import cli_entry

    cli_entry.print_checks(examine_coordinator(homes.home_path("coordinator")), json=json)


PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="A file whose first line is the passphrase; asked for if left out."),
]


def _passphrase(file: Path | None, *, new: bool) -> str:
    """Never from the command line, which everybody on the machine can read. Raises UsageError."""
    if file is None:
        if not sys.stdin.isatty():
            raise UsageError(
                "a passphrase is asked for, and there is no terminal", "--passphrase-file"
            )
        return str(typer.prompt("passphrase", hide_input=True, confirmation_prompt=new, err=True))
    try:
        return file.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read the passphrase: {err}") from err


def backup(
    file: Annotated[Path, typer.Argument(help="Where the backup is to be written.")],
    with_versions: Annotated[
        bool, typer.Option("--with-versions", help="Also the shared weights on this disk.")
    ] = False,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Under a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Keys, peers, settings and the ledger in one file; also while the coordinator runs.

    Who has the file has the coordinator's keys, unless it is encrypted.
    """
    from coordinator.admin import backup as backups
    from coordinator.admin import encryption

    home = homes.open_home("coordinator")
    if encrypt or passphrase_file:
        words = _passphrase(passphrase_file, new=True)
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=home) as folder:
            plain = Path(folder) / "backup"
            made = backups.write(home, plain, with_versions=with_versions)
            encryption.seal(plain, file, words)
    else:
        made = backups.write(home, file, with_versions=with_versions)
    if json:
        data = {"file": file, "fleet": made.fleet, "entries": made.entries, "head": made.head}
        sys.stdout.write(json_output.ok(data) + "\n")
    else:
        nbytes = sum(one.nbytes for one in made.files.values())
        sys.stderr.write(
            f"wrote {file}: {made.entries} entries of the ledger, {nbytes / 1e6:,.1f} MB in all\n"
            + (
                "without the passphrase nobody can open it, you neither\n"
                if encrypt or passphrase_file
                else "keep it where only you can read it: the coordinator's keys are in it\n"
            )
        )


def restore(
    file: Annotated[Path, typer.Argument(help="A backup.")],
    from_peers: Annotated[
        bool,
        typer.Option("--from-peers", help="Take the newest versions from the agents' disks."),
    ] = False,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
) -> None:
    """Make this machine the coordinator that a backup was made of. The home must be empty."""
    from coordinator.admin import backup as backups
    from coordinator.admin import encryption

    home = homes.home_path("coordinator")
    if encryption.is_sealed(file):
        words = _passphrase(passphrase_file, new=False)
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".restore-", dir=home.parent) as folder:
            plain = Path(folder) / "backup"
            encryption.unseal(file, plain, words)
            made = backups.restore(plain, home, from_peers=from_peers)
    else:
        made = backups.restore(file, home, from_peers=from_peers)
    if json:
        data = {"home": home, "fleet": made.fleet, "entries": made.entries, "made_at": made.at}
        sys.stdout.write(json_output.ok(data) + "\n")
        return
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(made.at))
    sys.stderr.write(f"restored {home} as it was on {at}\n")
    if not from_peers and not any(name.startswith("versions/") for name in made.files):
        sys.stderr.write("no shared weights are in it: --from-peers takes them from the agents\n")
    sys.stderr.write("next: commonweight up, under the address that the agents know\n")


@audit.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    peer: Annotated[str, typer.Option(help="Only this machine (id or name).")] = "",
    since: Annotated[str, typer.Option(help="2h, 7d, 2026-11-23 or 2026-11-23T18:00.")] = "",
    json: Json = False,
) -> None:
    """Who joined with which ticket, was approved, removed or refused; runs started and ended."""
    if context.invoked_subcommand is not None:
        return
    from coordinator.admin.audit import open_ledger, read_audit
    from protocols.messages.envelope import strip_controls

    after = parse_time(since, time.time()) if since else 0.0
    ledger = open_ledger(homes.open_home("coordinator"))
    try:
        found = read_audit(ledger, peer=peer, since=after)
    finally:
        ledger.close()
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    if not found:
        sys.stderr.write("nothing of that kind has happened\n")
    for line in found:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.at))
        sys.stdout.write(f"{line.seq:6} {at} {line.event:14} {strip_controls(line.text)}\n")


def parse_time(text: str, now: float) -> float:
    """Unix s of a date, a date with a time (local), or so long ago. Raises UsageError."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        pass
    try:
        return now - parse_seconds(text)
    except UsageError as err:
        raise UsageError(
            f"{text!r} is no time", "write 2h, 7d, 2026-11-23 or 2026-11-23T18:00"
        ) from err


@audit.command("verify")
def verify(json: Json = False) -> None:
    """Walk the ledger's chain of hashes; names the first entry that was changed.

    A cut end leaves a shorter chain that fits: keep the last hash elsewhere to find that, too.
    """
    from coordinator.admin.audit import open_ledger

    ledger = open_ledger(homes.open_home("coordinator"))
    try:
        changed, newest = ledger.verify(), ledger.newest()
    finally:
        ledger.close()
    if changed is not None:
        raise CommonweightError(
            f"entry {changed} was changed, or one before it is missing",
            "restore ledger.db from a backup; do not trust what comes after that entry",
        )
    count, head = (newest.seq, newest.hash.hex()) if newest else (0, "")
    if json:
        sys.stdout.write(json_output.ok({"entries": count, "head": head}) + "\n")
    else:
        sys.stdout.write(f"{count} entries, every hash fits; the last is {head or 'none'}\n")
