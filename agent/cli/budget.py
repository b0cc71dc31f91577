"""`commonweight-agent budget`: what was told about the owner's rows, and what that costs."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli.common import Json, print_data, print_line
from protocols.errors import UsageError
from protocols.local import homes

if TYPE_CHECKING:
    from agent.home.privacy_ledger import Charge, Limit

_MAX_ADDED = 1000.0


def budget(
    add: Annotated[
        float,
        typer.Option(
            help="Charge this ε by hand, for answers that a restored backup does not record, or "
            "that you have published elsewhere."
        ),
    ] = 0.0,
    restored: Annotated[
        bool,
        typer.Option(
            "--restored",
            help="Confirm that this home was restored and lacks entries of the ledger, and go on.",
        ),
    ] = False,
    note: Annotated[str, typer.Option(help="With --add: what it was for.")] = "",
    json: Json = False,
) -> None:
    """Show what was told about your data, who asked for it, and what it costs in privacy."""
    from agent.home import privacy_ledger, settings
    from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger
    from protocols.privacy.events import DiscreteLaplace

    home = homes.open_home("agent")
    limit = Limit.of(settings.read(home))
    with contextlib.closing(PrivacyLedger(privacy_ledger.ledger_file(home))) as ledger:
        if note and not add:
            raise UsageError(
                "--note belongs to --add", "commonweight-agent budget --add 0.5 --note …"
            )
        if add:
            if not 0 < add <= _MAX_ADDED:
                raise UsageError(
                    f"--add must be above 0 and at most {_MAX_ADDED:g}, not {add:g}",
                    "a charge cannot be removed",
                )
            ledger.charge(
                Charge("added", "", (DiscreteLaplace(add),), "", note or "added by hand"),
                Limit(0.0, limit.delta),
            )
            print_line(f"ε {add:g} is charged")
        if restored:
            print_line(_confirmed(ledger.confirm_loss()))
        charges, missing = ledger.charges(), ledger.num_missing()
    spent = privacy_ledger.spent_epsilon(charges, limit.delta)
    left = privacy_ledger.left_epsilon(charges, limit) if limit.epsilon else None
    entries = list(_groups(charges, limit.delta))
    data = {
        "epsilon": spent if math.isfinite(spent) else None,
        "delta": limit.delta,
        "max_epsilon": limit.epsilon or None,
        "left": left,
        "entries": entries,
        "missing": missing,
    }
    print_data(data, _lines(spent, limit, left, entries, missing), json=json)


def _confirmed(missing: int) -> str:
    if not missing:
        return "no entry of the ledger is missing"
    return (
        f"{missing} entries are confirmed as lost. Charge what they have cost, as far as you know: "
        "commonweight-agent budget --add E --note …"
    )


def _groups(charges: Sequence[Charge], delta: float) -> Iterator[dict[str, Any]]:
    """The charges by purpose, name and fleet, oldest first, with what each group costs alone."""
    from protocols.privacy import accountant
    from protocols.privacy.events import Event, SharedGaussian

    @functools.cache  # most questions cost the same
    def cost(spent: tuple[Event, ...]) -> float:
        return accountant.epsilon_of(spent, delta)

    groups: dict[tuple[str, str, str, bool], list[Charge]] = {}
    for charge in charges:
        key = charge.purpose, charge.name, charge.asked_by, charge.is_exact
        groups.setdefault(key, []).append(charge)
    for (purpose, name, fleet, exact), found in groups.items():
        spent = tuple(event for charge in found for event in charge.noisy)
        epsilon = None if exact else cost(spent)
        yield {
            "purpose": purpose,
            "name": name,
            "fleet": fleet,
            "about": found[-1].about,
            "answers": len(found),
            "first": found[0].at,
            "last": found[-1].at,
            "exact": exact,
            "epsilon": epsilon if epsilon is None or math.isfinite(epsilon) else None,
            "shared": max(
                (event.peers for event in spent if isinstance(event, SharedGaussian)), default=0
            ),
        }


def _lines(
    spent: float,
    limit: Limit,
    left: float | None,
    entries: Sequence[dict[str, Any]],
    missing: int,
) -> Iterator[str]:
    if not entries:
        yield "nothing about your rows has left this machine"
    noisy = [entry for entry in entries if not entry["exact"]]
    exact = [entry for entry in entries if entry["exact"]]
    for entry in noisy:
        cost = "no bound" if entry["epsilon"] is None else f"ε {entry['epsilon']:.3g}"
        answers = f"{entry['answers']} answer{'s' if entry['answers'] > 1 else ''}"
        relies = f", if {entry['shared'] - 1} trusted peers added their part of it"
        yield (
            f"{_heading(entry)}: {answers} with noise, {cost} alone"
            f"{relies if entry['shared'] else ''}"
        )
    for entry in exact:
        yield f"{_heading(entry)}: without noise, so there is no bound"
    of = f" of {limit.epsilon:g}" if limit.epsilon else ""
    if noisy or limit.epsilon:
        yield f"all answers with noise together cost ε {spent:.3g}{of}, at δ = {limit.delta:g}"
    if left is not None:
        yield f"left for one more run: ε {left:.3g}" if left else "nothing is left"
    else:
        yield "there is no limit; to set one: commonweight-agent policy set privacy.max_epsilon 5"
    if limit.epsilon and exact:
        yield "the answers without noise left before the limit was set"
    if missing:
        yield (
            f"this machine has stated {missing} more entries than the ledger has, as after a "
            "restore from a backup. Answers with noise stay here. Charge what is missing (--add), "
            "then confirm: commonweight-agent budget --restored"
        )


def _heading(entry: dict[str, Any]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["last"]))
    name = f" {entry['name'][:24]}" if entry["name"] else ""
    fleet = f" for fleet {entry['fleet'][:12]}" if entry["fleet"] else ""
    return f"{at}  {entry['purpose']}{name}{fleet} ({entry['about']})"
