"""`commonweight-agent ledger audit`: the coordinator's log as this machine knows it, and proofs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import Json, print_data, print_json, print_line
from agent.home import enrollment_file, fork_proofs
from protocols.enrollment import fork_proof
from protocols.errors import BadMessage, UsageError
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.local.command_line import App
from protocols.local.os_errors import os_errors_as

audit = App(name="audit", help="Check the coordinator's log of versions, and its proofs.")

_File = Annotated[Path, typer.Argument(help="A proof, or a file of `ledger audit heads`.")]


@audit.command("show")
def show(json: Json = False) -> None:
    """Show the newest head seen here, who agrees, and the proofs."""
    from agent.home.log_file import FILE
    from agent.home.log_store import LogStore
    from protocols.messages.version_log import SIGNED_HEAD

    home = homes.open_home("agent")
    joined, proofs = enrollment_file.read_enrollment(home), fork_proofs.all_files(home)
    pending = fork_proofs.not_acknowledged(home)
    lines, size, confirmed = [], 0, {}
    if (home / FILE).exists():
        with contextlib.closing(LogStore(home, joined.fleet)) as store:
            newest = store.newest()
            confirmed = {one.peer: one.size for one in store.confirmed()}
        if newest is not None:
            head = SIGNED_HEAD.decode(newest.head[64:])
            size = head.size
            lines.append(f"the coordinator's log has {size} entries here, {head.hash.hex()[:16]}")
    if not lines:
        lines.append("no log of versions was seen yet")
    lines += [f"{peer} has seen the same up to entry {at}" for peer, at in confirmed.items()]
    for path in proofs:
        try:
            text = fork_proof.check(joined.ca_pem.encode(), fork_proof.decode(path.read_bytes()))
        except BadMessage as err:  # such as one from before a rotation of the CA
            text = f"cannot be checked now: {err.message}"
        mark = "proof" if path in pending else "acknowledged proof"
        lines.append(f"{mark} {path}: {text}")
    if pending:
        lines.append("no work until you run: commonweight-agent ledger audit acknowledge")
    data = {
        "entries": size,
        "confirmed": confirmed,
        "proofs": proofs,
        "not_acknowledged": pending,
    }
    print_data(data, lines, json=json)


@audit.command("verify")
def verify(
    file: _File,
    ca: Annotated[
        Path | None, typer.Option(help="The fleet's CA certificate, where no agent has joined.")
    ] = None,
    json: Json = False,
) -> None:
    """Verify a proof that a coordinator showed two versions. It needs the CA certificate alone.

    Heads that another machine has seen are compared with those of this machine.
    """
    try:
        ca_pem = ca.read_bytes() if ca else b""
        if file.stat().st_size > fork_proof.MAX_PROOF_BYTES:
            raise UsageError(f"{file} is too long for a proof")
        data = file.read_bytes()
    except OSError as err:
        raise UsageError(f"cannot read {err.filename}: {err.strerror}") from err
    ca_pem = ca_pem or enrollment_file.read_enrollment(homes.open_home("agent")).ca_pem.encode()
    if b'"heads":' in data[:65536]:
        text = _compare_heads(ca_pem, data)
    else:
        try:
            text = fork_proof.check(ca_pem, fork_proof.decode(data))
        except BadMessage as err:
            raise BadMessage(f"this proves nothing: {err.message}", err.hint) from err
    if json:
        print_json({"verified": True, "text": text})
    else:
        sys.stdout.write(f"{text}\n")


def _compare_heads(ca_pem: bytes, data: bytes) -> str:
    """Compare the heads in a file with the log that is known here. Raises BadMessage."""
    from agent.home.log_store import LogStore

    home = homes.open_home("agent")
    peer, heads = fork_proof.open_seen(ca_pem, data)
    agreeing = unknown = 0
    with contextlib.closing(LogStore(home, enrollment_file.read_enrollment(home).fleet)) as store:
        epoch = int(store.number("epoch"))
        for _, head in heads:
            ours = store.hash_at(head.size)
            if head.epoch != epoch or ours is None:
                unknown += 1
            elif ours != head.hash:
                raise BadMessage(
                    f"{peer} has seen another log: its first {head.size} entries differ from ours",
                    "both machines have signed heads: the running agent makes the proof as soon "
                    "as it meets the other",
                )
            else:
                agreeing += 1
    return f"{agreeing} heads that {peer} has seen agree with ours; {unknown} cannot be compared"


@audit.command("heads")
def heads(file: Annotated[Path, typer.Argument(help="The file to write.")]) -> None:
    """Write the signed heads seen here, to audit the coordinator."""
    from agent.home.log_store import LogStore

    home = homes.open_home("agent")
    joined = enrollment_file.read_enrollment(home)
    with contextlib.closing(LogStore(home, joined.fleet)) as store:
        found, old_card = store.audit_heads(), store.meta("old card")
    seen = fork_proof.SeenLog(
        fleet=joined.fleet,
        transitions=joined.transitions,
        peer=joined.peer,
        cards=tuple(dict.fromkeys(filter(None, (joined.card, old_card)))),
        heads=tuple(found),
    )
    with os_errors_as(UsageError, f"cannot write {file}"):
        write_private(file, fork_proof.encode(seen))
    print_line(
        f"wrote {len(found)} heads; on the coordinator: commonweight admin audit verify {file}"
    )


@audit.command("acknowledge")
def acknowledge() -> None:
    """Work again for a coordinator that showed two versions. The proofs are kept."""
    home = homes.open_home("agent")
    done = fork_proofs.acknowledge(home)
    if not done:
        print_line("there is no proof to acknowledge")
    for path in done:
        print_line(f"acknowledged; the proof stays in {path}")
