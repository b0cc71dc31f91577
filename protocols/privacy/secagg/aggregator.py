"""The coordinator's side of secure aggregation: one cohort from its cards to the recovered masks.

Three decisions are events for the ledger: CohortFixed, SharersFixed, SurvivorsFixed. What peers
answered between them is asked for again after a restart, and peers repeat their answers, except the
sealed shares: the caller keeps those on disk before it records SharersFixed, because a peer that
has shared may be gone when another one masks. Pure.
"""

from __future__ import annotations

from collections.abc import Set

from msgspec import Struct

from protocols.errors import BadMessage, CohortLost
from protocols.messages.envelope import Digest
from protocols.privacy.secagg.cohort import Cohort
from protocols.privacy.secagg.messages import (
    AgreeAnswer,
    AgreeRequest,
    Answer,
    MaskAnswer,
    MaskRequest,
    Peers,
    Request,
    ShareAnswer,
    ShareRequest,
    UnmaskAnswer,
    UnmaskRequest,
)


class CohortFixed(Struct, frozen=True, tag=True, kw_only=True):
    """The plan and the cards of a cohort."""

    request: ShareRequest


class SharersFixed(Struct, frozen=True, tag=True, kw_only=True):
    """The peers whose shares are on disk. Each masks for exactly these."""

    sharers: Peers


class SurvivorsFixed(Struct, frozen=True, tag=True, kw_only=True):
    """The peers whose masked updates are on disk and count."""

    survivors: Peers


class Aggregator:
    """The state of one cohort. `apply` takes events from the ledger, `take` answers of peers."""

    def __init__(self, fixed: CohortFixed) -> None:
        self.cohort = Cohort(fixed.request)
        self.sharers: tuple[str, ...] = ()
        self.survivors: tuple[str, ...] = ()
        self.shares: dict[str, ShareAnswer] = {}
        self.uploads: dict[str, Digest] = {}
        self.signatures: dict[str, bytes] = {}
        self.told: dict[str, UnmaskAnswer] = {}

    def apply(self, event: SharersFixed | SurvivorsFixed) -> None:
        """Take a decision that is in the ledger."""
        if isinstance(event, SharersFixed):
            self.sharers = event.sharers
        else:
            self.survivors = event.survivors

    def take(self, peer: str, answer: Answer) -> None:
        """Take the answer of a peer. Raises BadMessage if it is not valid.

        A late or repeated answer changes nothing.
        """
        cohort = self.cohort
        if peer not in cohort.cards or answer.cohort != cohort.id:
            raise BadMessage(f"the answer of {peer} is for another cohort")
        match answer:
            case ShareAnswer():
                if answer.shares.keys() != set(cohort.neighbors(peer)):
                    raise BadMessage(
                        f"the answer of {peer} must contain one sealed share for each neighbor"
                    )
                if not self.sharers or peer in self.sharers:
                    self.shares.setdefault(peer, answer)
            case MaskAnswer():
                if peer in self.sharers and not self.survivors:
                    self.uploads.setdefault(peer, answer.digest)
            case AgreeAnswer():
                message = cohort.agreement(self.sharers, self.survivors)
                if not cohort.signs(peer, answer.signature, message):
                    raise BadMessage(f"{peer} has signed another set of survivors")
                if peer in self.survivors:
                    self.signatures[peer] = answer.signature
            case UnmaskAnswer():
                self._check_told(peer, answer)
                self.told.setdefault(peer, answer)

    def _check_told(self, peer: str, answer: UnmaskAnswer) -> None:
        survivors, group = set(self.survivors), set(self.cohort.group(peer))
        dropouts = set(self.sharers) - survivors
        if peer not in survivors:
            raise BadMessage(f"{peer} is not among the survivors, so its shares do not count")
        if answer.seeds.keys() != survivors & group or answer.keys.keys() != dropouts & group:
            raise BadMessage(f"the answer of {peer} must contain one share of each neighbor")

    def request_for(self, peer: str) -> Request | None:
        """What this peer is asked next; None if nothing is missing from it now."""
        cohort = self.cohort
        if not self.sharers:
            return None if peer in self.shares else cohort.request
        if not self.survivors:
            if peer not in self.sharers or peer in self.uploads:
                return None
            neighbors = set(self.sharers).intersection(cohort.neighbors(peer))
            shares = {one: self.shares[one].shares[peer] for one in sorted(neighbors)}
            return MaskRequest(cohort=cohort.id, sharers=self.sharers, shares=shares)
        if peer not in self.survivors:
            return None
        # Ask also a peer that has sent its shares: after a restart, others need its signature.
        if peer not in self.signatures:
            return AgreeRequest(cohort=cohort.id, survivors=self.survivors)
        if peer in self.told:
            return None
        group = cohort.group(peer)
        signatures = {one: self.signatures[one] for one in group if one in self.signatures}
        if len(signatures) < cohort.threshold:
            return None
        return UnmaskRequest(cohort=cohort.id, signatures=signatures)

    def fix_sharers(self) -> SharersFixed:
        """Continue with the peers that have shared. Raises CohortLost if too few have.

        A peer with too few neighbors among them is left out. Its neighbors may then lack one, too.
        """
        sharers = set(self.shares)
        while alone := {peer for peer in sharers if not self.has_group(peer, sharers)}:
            sharers -= alone
        if not sharers:
            raise CohortLost(
                f"{len(self.shares)} of {len(self.cohort.peers)} peers have shared their keys, and "
                f"a sum needs {self.needed()}",
                "the coordinator asks all peers again; no update has left a peer",
            )
        return SharersFixed(sharers=tuple(sorted(sharers)))

    def fix_survivors(self) -> SurvivorsFixed:
        """Continue with the peers whose updates are here. Raises CohortLost if too few are."""
        survivors = set(self.uploads)
        needed = self._secrets_for(survivors)
        if not survivors or not all(self.has_group(peer, survivors) for peer in needed):
            raise CohortLost(
                f"{len(survivors)} of {len(self.sharers)} masked updates have arrived, and the sum "
                f"needs {self.needed()}",
                "the coordinator asks all peers to train again, with new keys; masked updates "
                "reveal nothing",
            )
        return SurvivorsFixed(survivors=tuple(sorted(survivors)))

    def can_recover(self) -> bool:
        """Whether enough peers have sent their shares."""
        told = set(self.told)
        return bool(self.survivors) and all(
            self.has_group(peer, told) for peer in self.wanted_secrets()
        )

    def wanted_secrets(self) -> list[str]:
        """The peers of which a secret is needed: survivors, and dropouts that masked with them."""
        return self._secrets_for(set(self.survivors))

    def needed(self) -> int:
        """The fewest peers with which a sum can be unmasked, of one group."""
        return self.cohort.threshold

    def _secrets_for(self, survivors: set[str]) -> list[str]:
        """The sharers in whose group a survivor is; each peer is in its own."""
        return [peer for peer in self.sharers if survivors.intersection(self.cohort.group(peer))]

    def has_group(self, peer: str, among: Set[str]) -> bool:
        """Whether enough of this peer's group, with itself, are among these."""
        return len(among & set(self.cohort.group(peer))) >= self.cohort.threshold
