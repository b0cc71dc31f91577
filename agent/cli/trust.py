"""`commonweight-agent trust`: the peers whose owners you know, for secure sums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import Json, print_data, print_line
from agent.cli.names import complete_trusted
from agent.home import enrollment_file, settings
from agent.home.settings_schema import AgentSettings
from protocols.enrollment import identity
from protocols.errors import NotEnrolled, UnknownName, UsageError
from protocols.local import homes
from protocols.local.command_line import App
from protocols.messages.envelope import strip_controls

trust = App(name="trust", help="Choose the peers that count in a secure sum.")

_MAX_NAME_CHARS = 64


@trust.command("add")
def add(
    peers: Annotated[
        list[str],
        typer.Argument(
            metavar="ID...",
            help="Their ids: `commonweight-agent status id`, there. Ask the owners.",
        ),
    ],
    name: Annotated[
        str, typer.Option(help="Your name for one peer, such as the organization.")
    ] = "",
) -> None:
    """Trust peers: their owners have told you the ids.

    A secure sum hides your update among the peers that you trust. Others may take part, but the
    coordinator could have invented them.
    """
    home, name = homes.open_home("agent"), strip_controls(name.strip()[:_MAX_NAME_CHARS])
    if name and len(peers) > 1:
        raise UsageError("--name is for one peer", "add each peer with its own name")
    added = {_checked(peer, home): name for peer in peers}
    with settings.locked(home):
        known = settings.read_own(home).trust
        added = {peer: name or known.get(peer, "") for peer in added}
        chosen = settings.change(home, trust={**known, **added})
    for peer, label in added.items():
        print_line(f"trusts {peer}{f' ({label})' if label else ''}")
    print_line(_summary(chosen))


def _checked(peer: str, home: Path) -> str:
    """The id as it is written, if it can be trusted. Raises UsageError."""
    peer = peer.strip().upper()
    if not identity.is_peer_id(peer):
        raise UsageError(
            f"{peer!r} is no id of a peer: a letter is wrong or missing",
            "ask its owner for the output of: commonweight-agent status id",
        )
    if peer == _own_id(home):
        raise UsageError("this is the id of this machine, which counts anyway")
    return peer


@trust.command("list")
def list_trusted(json: Json = False) -> None:
    """List the peers that you trust."""
    home = homes.open_home("agent")
    chosen = settings.read(home)
    data = {
        "own": _own_id(home),
        "peers": [{"peer": peer, "name": name} for peer, name in chosen.trust.items()],
        "secure_min": chosen.secure_min,
    }
    lines = [f"{peer}  {name}".rstrip() for peer, name in chosen.trust.items()]
    print_data(data, lines, json=json)
    if not json:
        print_line(_summary(chosen))
        if data["own"]:
            print_line(f"the id of this machine, for other owners: {data['own']}")


@trust.command("remove")
def remove(
    peer: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Its id, or your name for it.", autocompletion=complete_trusted
        ),
    ],
) -> None:
    """Trust a peer no longer. This takes effect at once."""
    home = homes.open_home("agent")
    with settings.locked(home):
        known = settings.read_own(home).trust
        found = [one for one, name in known.items() if peer.strip().upper() == one or peer == name]
        if len(found) != 1:
            many = f"{len(found)} trusted peers have the name {peer!r}"
            raise UnknownName(
                many if found else f"{peer!r} is not among the trusted peers",
                "commonweight-agent trust list",
            )
        rest = {one: name for one, name in known.items() if one != found[0]}
        chosen = settings.change(home, trust=rest)
    print_line(f"no longer trusts {found[0]}; {_summary(chosen)}")


def count(peers: int) -> str:
    """`1 peer`, `3 peers`."""
    return f"{peers} peer{'' if peers == 1 else 's'}"


def _summary(chosen: AgentSettings) -> str:
    """How many peers are trusted, and whether a secure sum needs more."""
    more = f"; a secure sum needs {chosen.missing_trust} more" if chosen.missing_trust else ""
    return f"{count(len(chosen.trust))} trusted{more}"


def _own_id(home: Path) -> str:
    """This machine's id; empty before it has joined a fleet."""
    try:
        return enrollment_file.read_enrollment(home).peer
    except NotEnrolled:
        return ""
