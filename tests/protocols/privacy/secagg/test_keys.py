"""Shamir shares, derived keys, sealed shares, and how many neighbors a ring needs."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from protocols.errors import BadMessage
from protocols.privacy.secagg import keys, shamir
from protocols.privacy.secagg.cohort import MAX_COHORT, neighbor_count, threshold

COHORT = bytes(32)


def test_the_prime_is_one() -> None:
    # Miller and Rabin with 40 bases; a composite number passes with a chance below 4^-40.
    rnd, odd, power = random.Random(1), shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, power = odd // 2, power + 1
    for _ in range(40):
        value = pow(rnd.randrange(2, shamir.PRIME - 1), odd, shamir.PRIME)
        chain = [pow(value, 2**i, shamir.PRIME) for i in range(power)]
        assert value == 1 or shamir.PRIME - 1 in chain


@pytest.mark.parametrize("secret", [bytes(32), bytes([255]) * 32, bytes(range(32))])
def test_any_t_shares_give_the_secret_and_fewer_do_not(secret: bytes) -> None:
    rnd = random.Random(2)
    shares = shamir.split(secret, 3, range(1, 6), lambda: rnd.randrange(shamir.PRIME))
    for places in itertools.combinations(range(1, 6), 3):
        some = [shares[place - 1] for place in places]
        assert shamir.combine(some, shamir.lagrange(places)) == secret
    for places in itertools.combinations(range(1, 6), 2):
        some = [shares[place - 1] for place in places]
        assert shamir.combine(some, shamir.lagrange(places)) != secret


def test_two_peers_have_one_mask_and_each_direction_its_own_seal() -> None:
    one, other = keys.CardSecrets(b"1" * 32), keys.CardSecrets(b"2" * 32)
    publics = [keys.public_of(card.mask_key) for card in (one, other)]
    mask = keys.pair_mask(one.mask_key, publics[1], COHORT)
    assert mask == keys.pair_mask(other.mask_key, publics[0], COHORT)
    assert mask != keys.pair_mask(one.mask_key, publics[1], b"\1" * 32)

    channels = [keys.public_of(card.channel_key) for card in (one, other)]
    sealed = keys.seal(one.channel_key, channels[1], COHORT, ("a", "b"), b"text")
    assert keys.unseal(other.channel_key, channels[0], COHORT, ("a", "b"), sealed) == b"text"
    for cohort, way in ((COHORT, ("b", "a")), (b"\1" * 32, ("a", "b"))):
        with pytest.raises(BadMessage, match="not sealed"):
            keys.unseal(other.channel_key, channels[0], cohort, way, sealed)


def test_all_secrets_of_a_card_differ_and_come_back() -> None:
    card, again = keys.CardSecrets(b"1" * 32), keys.CardSecrets(b"1" * 32)
    shares = card.split(COHORT, 3, range(1, 4))
    assert shares == again.split(COHORT, 3, range(1, 4))
    assert shares != card.split(b"\1" * 32, 3, range(1, 4))
    secrets = [card.self_seed, card.mask_seed, card.nonce, card.rounding_seed(COHORT)]
    secrets += [card.channel_key.private_bytes_raw(), *itertools.chain(*shares)]
    assert len(set(secrets)) == len(secrets)


#: Points of low order, which give the shared secret zero (RFC 7748, section 6.1).
LOW_ORDER = (bytes(32), b"\1" + bytes(31), b"\xed" + b"\xff" * 30 + b"\x7f")


@pytest.mark.parametrize("public", LOW_ORDER)
def test_a_key_of_low_order_is_refused(public: bytes) -> None:
    with pytest.raises(BadMessage, match="invalid X25519 key"):
        keys.exchange(keys.CardSecrets(b"1" * 32).mask_key, public)


def _log2_chance(peers: int, bad: int, drawn: int, at_least: int) -> float:
    """log2 of the chance that a draw has `at_least` of the bad ones or more (hypergeometric)."""

    def choose(n: int, k: int) -> int:
        return math.comb(n, k) if 0 <= k <= n else 0

    ways = sum(
        choose(bad, i) * choose(peers - bad, drawn - i)
        for i in range(at_least, min(bad, drawn) + 1)
    )
    return (math.log2(ways) - math.log2(math.comb(peers, drawn))) if ways else -math.inf


@pytest.mark.parametrize("peers", [66, 229, 230, 256, 320, 384, 512, 768, 1000, MAX_COHORT])
def test_a_tenth_of_colluding_peers_is_together_nowhere(peers: int) -> None:
    count = neighbor_count(peers)
    group = count + 1
    assert count % 2 == 0
    assert count < peers
    needed, bad = threshold(group), peers // 10
    colluding = math.log2(peers) + _log2_chance(peers - 1, bad, count, 2 * needed - group)
    assert colluding < -80


def test_up_to_65_peers_all_are_neighbors() -> None:
    assert [neighbor_count(peers) for peers in (3, 8, 64, 65, 66)] == [2, 7, 63, 64, 64]
    assert [threshold(group) for group in (3, 4, 8, 64, 65)] == [2, 3, 6, 43, 44]
