"""The task files that the operator offers, as this home keeps them: a list, and files by digest.

Nothing imports these files: they have no suffix, no folder that Python searches, and mode 0600. A
file that the owner approves is copied to a folder of its own (`agent.setup.offers`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from msgspec.structs import replace

from agent.home.settings_schema import AgentSettings
from agent.policy.consent import Consent, Review
from protocols.errors import HomeError
from protocols.local.atomic_files import read_json, write_private
from protocols.local.safe_paths import path_in
from protocols.messages.offers import Offer, OfferList

FILE, FOLDER = "offers.json", "offers"


def read(home: Path) -> OfferList:
    """The last list; an empty one if the file is missing or damaged."""
    return read_json(home / FILE, OfferList) or OfferList(fleet="none", number=0)


def write(home: Path, offers: OfferList) -> None:
    """Replace the list, and delete files that are not on it. Raises OSError."""
    write_private(home / FILE, msgspec.json.encode(offers))
    prune(home, offers)


def prune(home: Path, *lists: OfferList) -> None:
    """Delete files that none of these lists names. Raises OSError."""
    named = {offer.digest for offers in lists for offer in offers.offers}
    for path in (home / FOLDER).glob("*"):
        if path.name not in named:
            path.unlink(missing_ok=True)


def write_file(home: Path, digest: str, data: bytes) -> None:
    """Keep an offered file. Raises OSError."""
    (home / FOLDER).mkdir(mode=0o700, exist_ok=True)
    write_private(path_in(home / FOLDER, digest), data)


def read_file(home: Path, offer: Offer) -> bytes:
    """The offered file. Raises HomeError if it is missing or was changed."""
    try:
        data = path_in(home / FOLDER, offer.digest).read_bytes()
    except OSError:
        data = None
    if data is None or hashlib.sha256(data).hexdigest() != offer.digest:
        raise HomeError(
            f"the offered file of {offer.name} is missing here, or was changed",
            "ask the operator to offer it again; policy show says if `offers` is off",
        )
    return data


def marked(home: Path, chosen: AgentSettings) -> AgentSettings:
    """The settings, with a mark in the consent to each task whose offer its owner has to review.

    An offer asks about a task that is new here, and about one that the owner approved as another
    offered file. The owner's own task files are never asked about.
    """
    if chosen.fleet:  # the fleet below has its own owners
        return chosen
    present, consents = read(home).by_name(), chosen.consents
    marks: dict[str, Review] = {
        name: "withdrawn" for name, said in consents.items() if said.offer and name not in present
    }
    for name, offer in present.items():
        approved = consents.get(name, Consent()).offer
        if approved == offer.digest or (not approved and name in chosen.task_files):
            continue
        if chosen.offers == "show":
            marks[name] = "offered"
        elif approved:
            marks[name] = "withdrawn"
    if not marks:
        return chosen
    changed = {name: replace(consents.get(name, Consent()), review=m) for name, m in marks.items()}
    return replace(chosen, consents=consents | changed)
