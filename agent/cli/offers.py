"""`commonweight-agent task offers`, `review` and `approve`: task files that the operator offers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from agent.cli import prompts
from agent.cli.common import Json, is_running, print_data, print_json, print_line
from agent.cli.names import whole_task_name
from agent.home import settings, task_offers
from agent.home.settings_schema import AgentSettings
from agent.policy.consent import Standing
from agent.setup import offers
from protocols.errors import CommonweightError, UsageError
from protocols.local import homes


def complete_offers() -> list[tuple[str, str]]:
    """The offered tasks, with the first characters of their digests."""
    try:
        present = task_offers.read(homes.home_path("agent")).offers
    except CommonweightError:
        return []
    return [(one.name, one.id) for one in present]


OfferName = Annotated[
    str,
    typer.Argument(
        help="Its name or id in `task offers`.",
        autocompletion=complete_offers,
        callback=whole_task_name,
        metavar="ID",
    ),
]
_WORDS: dict[Standing, str] = {
    "allowed": "✓ approved",
    "forbidden": "✗ forbidden",
    "offered": "? awaits your review",
    "changed": "? the approved file was changed here",
}


def list_offers(json: Json = False) -> None:
    """List the task files that the operator offers. None runs before you approve it."""
    home = homes.open_home("agent")
    chosen, present = settings.read(home), task_offers.read(home).offers
    if chosen.offers == "off":
        present = ()
    rows = [
        {
            "id": one.id,
            "task": one.name,
            "sha256": one.digest,
            "bytes": one.nbytes,
            "at": one.at,
            "by": one.by,
            "note": one.note,
            "standing": _standing(chosen, one.name, one.digest),
        }
        for one in present
    ]
    lines = [
        f"{one.id}  {_WORDS.get(_standing(chosen, one.name, one.digest), '? not in use')}  "
        f"{offers.describe(one)}"
        for one in present
    ]
    print_data(rows, lines, json=json)
    if not (rows or json):
        is_off = chosen.offers == "off"
        print_line("no offers are kept: policy set offers show" if is_off else "no offers")


def _standing(chosen: AgentSettings, name: str, digest: str) -> Standing:
    """That of the task; `awaiting` if the task in use is another file than the offered one."""
    standing = chosen.standing_of(name)
    is_other = chosen.consent_to(name).offer != digest
    return "awaiting" if standing == "allowed" and is_other else standing


def review(offer: OfferName, json: Json = False) -> None:
    """Show an offered file, compared with the one you approved."""
    home = homes.open_home("agent")
    found = offers.review(home, offers.find(home, offer))
    made = found.offer
    if json:
        print_json({"offer": made, "compared": found.compared, "diff": found.diff})
        return
    _show(found)
    print_line(f"to approve it: commonweight-agent task approve {made.id}")
    print_line(f"to refuse it: commonweight-agent task forbid {made.name}")


def _show(found: offers.Review) -> None:
    made = found.offer
    head = (offers.describe(made), f"sha256 {made.digest}", f"compared with {found.compared}")
    # Each line of the file has a mark or a space before it, so none looks like one of ours.
    sys.stdout.writelines(f"{line}\n" for line in (*head, *found.diff))
    sys.stdout.flush()


def approve(
    offer: OfferName,
    sha256: Annotated[
        str, typer.Option(help="The whole hash that you approve; then nothing is asked.")
    ] = "",
) -> None:
    """Show an offered file, and allow it to run here if you agree."""
    home = homes.open_home("agent")
    found = offers.find(home, offer)
    if sha256 and sha256.lower() != found.digest:
        raise UsageError(
            f"the offered file of {found.name} has another hash: {found.digest}",
            f"commonweight-agent task review {found.name}",
        )
    if not sha256:
        if not prompts.can_ask():
            raise UsageError(
                "nothing was approved: there is no terminal to confirm it on",
                f"commonweight-agent task approve {found.id} --sha256 HASH, as `task review` "
                "shows it",
            )
        # Shown again: since the review, another file may have the same name, or start of a digest.
        _show(offers.review(home, found))
        question = "may this file run on your data, in the sandbox, when a run asks for it?"
        typer.confirm(question, abort=True, err=True)
    offers.approve(home, found)
    print_line(f"approved {found.name}, sha256 {found.digest}")
    print_line(f"to try it: commonweight-agent task check {found.name}")
    print_line(f"to revoke it: commonweight-agent task remove {found.name}")
    if is_running(home):
        print_line("the running agent takes part after its current work")


COMMANDS: dict[str, Callable[..., None]] = {
    "offers": list_offers,
    "review": review,
    "approve": approve,
}
