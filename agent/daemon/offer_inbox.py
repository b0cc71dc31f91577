"""Fetches the task files that the operator offers, and keeps them for their owner's review.

Nothing here runs or imports a file, and nothing is approved here.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent.home import consent_requests, offer_log, task_offers
from agent.home.enrollment_file import Enrollment
from agent.home.live_settings import LiveSettings
from agent.transport.coordinator_requests import CoordinatorRequests
from protocols.enrollment import identity
from protocols.errors import BadMessage, CommonweightError, HomeError
from protocols.messages.offers import SIGNED_OFFERS, Offer, OfferList, check_text

log = logging.getLogger("commonweight.agent")

#: The shortest interval between two requests for the list.
MIN_GAP_S = 5.0


class OfferInbox:
    """Call `news` with the number that each answer to a poll has.

    `link()` returns the client of the coordinator whose key is in the enrollment.
    """

    def __init__(
        self, home: Path, enrollment: Enrollment, link: Callable[[], CoordinatorRequests]
    ) -> None:
        self._home, self._link, self._fleet = home, link, enrollment.fleet
        self._verify = partial(identity.verify, enrollment.coordinator_public)
        self._owner = LiveSettings(home)
        known = task_offers.read(home)
        self._number = known.number if known.fleet == self._fleet else 0
        self._next_at, self._last_error = 0.0, ""
        self._fetching = threading.Lock()

    def news(self, number: int) -> None:
        """Fetch the list if it is newer than the one that is kept. Blocking; raises nothing."""
        if number <= self._number or time.monotonic() < self._next_at or self._owner().fleet:
            return
        if not self._fetching.acquire(blocking=False):  # the other thread does
            return
        self._next_at = time.monotonic() + MIN_GAP_S
        try:
            self._take(self._fetch_list())
        except CommonweightError as err:
            self._note(err.message)
        except OSError as err:
            self._note(err.strerror or str(err))
        finally:
            self._fetching.release()

    def _note(self, error: str) -> None:
        if error != self._last_error:  # each poll tries again
            log.warning("the offered tasks cannot be fetched: %s", error)
        self._last_error = error

    def _fetch_list(self) -> OfferList:
        """The coordinator's list. Raises BadMessage for one that is not of this fleet, or mixed up.

        Raises Unreachable, Refused.
        """
        found = SIGNED_OFFERS.unpack(self._link().task_offers(), self._verify)
        if found.fleet != self._fleet:
            raise BadMessage("the list of offered tasks is that of another fleet")
        if len(found.by_name()) != len(found.offers):
            raise BadMessage("the list of offered tasks has two files of one name")
        return found

    def _take(self, found: OfferList) -> None:
        """Keep what is new in a list, and note what is gone. Raises BadMessage for an older one."""
        known = task_offers.read(self._home)
        if known.fleet == found.fleet and found.number <= known.number:
            raise BadMessage("the list of offered tasks is older than the one that is kept here")
        # Files of earlier lists, whose fetch broke off, do not add up.
        task_offers.prune(self._home, known, found)
        is_shown = self._owner().offers == "show"
        kept = tuple(one for one in found.offers if not is_shown or self._keep(one))
        before, after = known.by_name(), {one.name: one for one in kept}
        new = [one for one in kept if _digest(before, one.name) != one.digest]
        gone = [one for one in known.offers if _digest(after, one.name) != one.digest]
        for one in gone:
            told = "replaced by another offer" if one.name in after else "withdrawn"
            offer_log.write(self._home, "task withdrawn", one.name, one.digest, told)
        for one in new:
            offer_log.write(self._home, "task offered", one.name, one.digest, one.by)
        task_offers.write(
            self._home, OfferList(fleet=found.fleet, number=found.number, offers=kept)
        )
        self._number, self._last_error = found.number, ""
        for one in gone:
            if one.name not in after:
                log.warning("the operator has withdrawn the task %s (%s)", one.name, one.id)
                if one.name not in self._owner().task_files:
                    consent_requests.drop(self._home, one.name)
        for one in new if is_shown else ():
            log.warning(
                "the operator offers the task %s (%s), which does not run before you approve it: "
                "commonweight-agent task review %s",
                *(one.name, one.id, one.name),
            )

    def _keep(self, offer: Offer) -> bool:
        """Fetch an offered file, unless it is here. False if it is no file that may be kept."""
        try:
            task_offers.read_file(self._home, offer)
        except HomeError:
            data = self._link().offered_file(offer.digest)
            try:
                if hashlib.sha256(data).hexdigest() != offer.digest or len(data) != offer.nbytes:
                    raise BadMessage("the file is not the one that the list names")
                check_text(data)
            except BadMessage as err:
                log.warning("the offered task %s is not kept: %s", offer.name, err.message)
                return False
            task_offers.write_file(self._home, offer.digest, data)
        return True


def _digest(offers: dict[str, Offer], name: str) -> str:
    return offers[name].digest if name in offers else ""
