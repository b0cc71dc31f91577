"""Which masks are left in the sum of the masked updates, from the shares that peers told. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocols.errors import CohortLost
from protocols.privacy.secagg import keys, shamir
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.masks import RingArray, add_masks, add_words


class Recovery(NamedTuple):
    """The seeds of the masks to add to the sum and to subtract from it.

    `false_shares`: (owner, holder) of each share that does not fit the others. One of the two has
    lied; the protocol cannot tell which.
    """

    plus: list[bytes]
    minus: list[bytes]
    false_shares: frozenset[tuple[str, str]]

    def unmask(self, total: RingArray, start: int = 0) -> None:
        """Unmask the sum of the survivors' arrays, or the piece from `start` on, in place."""
        add_masks(total, self.plus, self.minus, start)

    def unmask_tail(self, total: RingArray) -> None:
        """Unmask the sum of the survivors' metrics uint64[n], in place."""
        add_masks(total, [*map(keys.tail_of, self.plus)], [*map(keys.tail_of, self.minus)])

    def unmask_words(self, total: npt.NDArray[np.uint64]) -> None:
        """Unmask the sum of the survivors' numbers of a question, uint64[n, w], in place."""
        add_words(total, [*map(keys.words_of, self.plus)], [*map(keys.words_of, self.minus)])


def recover(state: Aggregator) -> Recovery:
    """The masks of survivors and dropouts. Raises CohortLost if shares are missing or false."""
    cohort, survivors = state.cohort, set(state.survivors)
    factors: dict[tuple[int, ...], list[int]] = {}
    plus: list[bytes] = []
    minus: list[bytes] = []
    false_shares: set[tuple[str, str]] = set()

    def secret_of(owner: str, prove: Callable[[bytes], bytes], expected: bytes) -> bytes:
        holders = [peer for peer in cohort.group(owner) if peer in state.told]
        threshold = cohort.threshold
        # Leave out one of the first t + 1 at a time, in case it sent a false share.
        tries = [holders[:threshold]]
        tries += [[*holders[:i], *holders[i + 1 : threshold + 1]] for i in range(threshold)]
        for some in tries:
            if len(some) < threshold:
                break
            places = tuple(cohort.place(owner, holder) for holder in some)
            if places not in factors:
                factors[places] = shamir.lagrange(places)
            told = [state.told[holder] for holder in some]
            shares = [(one.seeds if owner in survivors else one.keys)[owner] for one in told]
            secret = shamir.combine(shares, factors[places])
            if secret is not None and prove(secret) == expected:
                if some is not tries[0]:
                    left_out = set(holders[: threshold + 1]) - set(some)
                    false_shares.update((owner, holder) for holder in left_out)
                return secret
        raise CohortLost(
            f"the shares of {owner}'s secret are inconsistent: {owner}, or one of the "
            f"{len(holders)} peers that sent a share, has lied",
            "the coordinator asks all peers again, with new keys",
        )

    for owner in state.wanted_secrets():
        card = cohort.cards[owner]
        if owner in survivors:
            seed = secret_of(owner, keys.commitment, card.commitment)
            minus.append(keys.self_mask(seed, cohort.id))
            continue
        key = X25519PrivateKey.from_private_bytes(secret_of(owner, _public, card.mask_key))
        for peer in survivors.intersection(cohort.group(owner)):
            mask = keys.pair_mask(key, cohort.cards[peer].mask_key, cohort.id)
            # The survivor added it if its name comes first, and subtracted it otherwise.
            (minus if peer < owner else plus).append(mask)
    return Recovery(plus, minus, frozenset(false_shares))


def _public(mask_seed: bytes) -> bytes:
    return keys.public_of(X25519PrivateKey.from_private_bytes(mask_seed))
