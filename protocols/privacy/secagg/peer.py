"""The agent's side of secure aggregation: pure steps over the state of one turn.

A step takes the state and a request, and returns the next state and the answer. The caller writes
the state durably before the answer leaves. A repeated request gets the same answer; a request that
contradicts an earlier one is refused. So no coordinator gets both kinds of share of one peer, a
second cohort for a card, or a second set of survivors. Neither its requests nor restarts of the
agent change that.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NoReturn

from msgspec.structs import replace

from protocols.errors import BadMessage, SecureRefused
from protocols.privacy.secagg import keys, ring, shamir
from protocols.privacy.secagg.cohort import Cohort, Pins, in_order
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    AgreeAnswer,
    AgreeRequest,
    Card,
    MaskAnswer,
    MaskRequest,
    ReadyRequest,
    ShareAnswer,
    ShareRequest,
    SignedCard,
    TailNames,
    UnmaskAnswer,
    UnmaskRequest,
)
from protocols.privacy.secagg.turn import Masking, Me, Sign, Turn
from protocols.privacy.shared_noise import SharedNoise

#: In place of the secrets of a turn that is over.
_ERASED = bytes(32)


def make_card(
    me: Me,
    request: ReadyRequest,
    examples: int,
    master: bytes,
    names: TailNames = TailNames(),
    noise: SharedNoise | None = None,
) -> Turn:
    """Step ready: the state of a new turn, with its card. `master`: 32 fresh random bytes.

    `noise`: what the update has of the noise that the peers share, if they do.
    """
    secrets = keys.CardSecrets(master)
    card = Card(
        fleet=request.fleet,
        run=request.run,
        round=request.round,
        turn=request.turn,
        kind=request.kind,
        base=request.base,
        peer=me.peer,
        public=me.public,
        examples=examples,
        mask_key=keys.public_of(secrets.mask_key),
        channel_key=keys.public_of(secrets.channel_key),
        commitment=keys.commitment(secrets.self_seed),
        nonce=secrets.nonce,
        terms=request.terms,
    )
    signed = SignedCard(*SIGNED_CARD.seal(card, me.sign))
    return Turn(ready=request, peer=me.peer, master=master, card=signed, names=names, noise=noise)


def share(
    state: Turn, request: ShareRequest, pins: Pins, layout: tuple[int, ...]
) -> tuple[Turn, ShareAnswer]:
    """Step share: checks the cohort and seals a share of both secrets for each neighbor.

    `layout`: elements of each tensor of this peer's model; empty for an evaluation. Raises
    SecureRefused, BadMessage, UsageError.
    """
    if state.cohort is not None:
        if state.cohort != request:
            _refuse("second cohort", "this peer's card is already part of another cohort")
        cohort = _cohort(state)
    else:
        cohort = Cohort(request)
        _check_cohort(state, cohort, pins, layout)
    me, secrets = state.peer, _secrets(state)
    group = cohort.group(me)
    places = range(1, len(group) + 1)
    shares = {}
    for peer, pair in zip(group, secrets.split(cohort.id, cohort.threshold, places), strict=True):
        if peer != me:
            public = cohort.cards[peer].channel_key
            # Fails for a key of low order before any share leaves.
            keys.exchange(secrets.mask_key, cohort.cards[peer].mask_key)
            shares[peer] = keys.seal(
                secrets.channel_key, public, cohort.id, (me, peer), b"".join(pair)
            )
    return replace(state, cohort=request), ShareAnswer(cohort=cohort.id, shares=shares)


def mask(state: Turn, request: MaskRequest, pins: Pins) -> tuple[Turn, Masking]:
    """Step mask: checks the shares of others and derives the masks for the update.

    Raises SecureRefused, BadMessage.
    """
    cohort = _cohort(state, request.cohort)
    if state.mask is None:
        _check_sharers(state, cohort, request, pins)
    elif state.mask != request:
        _refuse("second sharers", "this peer has already masked for another set of peers")
    secrets, me = _secrets(state), state.peer
    plus, minus = [keys.self_mask(secrets.self_seed, cohort.id)], list[bytes]()
    for peer in _neighbors_in(cohort, me, request.sharers):
        seed = keys.pair_mask(secrets.mask_key, cohort.cards[peer].mask_key, cohort.id)
        (plus if me < peer else minus).append(seed)
    factor = cohort.cards[me].examples / cohort.plan.divisor if cohort.plan.divisor else 0.0
    seed = secrets.rounding_seed(cohort.id)
    masking = Masking(cohort, cohort.weights[me], plus, minus, seed, factor)
    return replace(state, mask=request), masking


def uploaded(state: Turn, digest: str, nbytes: int) -> tuple[Turn, MaskAnswer]:
    """After step mask: the digest of the masked update. Raises SecureRefused for a second one."""
    if state.cohort is None or state.mask is None:
        _refuse("order", "this peer has not derived the masks of its update")
    if state.upload not in ("", digest):
        _refuse("second update", "this peer has already masked another update with these keys")
    answer = MaskAnswer(cohort=state.mask.cohort, digest=digest, nbytes=nbytes)
    return replace(state, upload=digest, upload_bytes=nbytes), answer


def agree(state: Turn, request: AgreeRequest, pins: Pins, sign: Sign) -> tuple[Turn, AgreeAnswer]:
    """Step agree: signs whose updates count, once. Raises SecureRefused, BadMessage."""
    cohort = _cohort(state, request.cohort)
    if state.mask is None or not state.upload:
        _refuse("order", "the survivors were named before this peer sent its update")
    if state.agree is None:
        survivors, sharers = set(request.survivors), set(state.mask.sharers)
        if not in_order(request.survivors) or not survivors <= sharers:
            _refuse("survivors", "a survivor has not shared, or is named twice")
        _check_set(state, cohort, survivors, pins, "survivors")
    elif state.agree != request:
        _refuse("second survivors", "this peer has already signed another set of survivors")
    message = cohort.agreement(state.mask.sharers, request.survivors)
    return replace(state, agree=request), AgreeAnswer(cohort=cohort.id, signature=sign(message))


def unmask(state: Turn, request: UnmaskRequest) -> tuple[Turn, UnmaskAnswer]:
    """Step unmask: one kind of share of each neighbor, if enough of them have signed the same.

    The answer follows from what was signed. With it, the secrets of the turn are erased: nothing
    needs them any more, as only this step and the one before can be repeated.
    Raises SecureRefused, BadMessage.
    """
    cohort = _cohort(state, request.cohort)
    if state.told is not None:
        return state, state.told
    if state.mask is None or state.agree is None:
        _refuse("order", "shares were requested before this peer signed the survivors")
    me, survivors = state.peer, set(state.agree.survivors)
    message = cohort.agreement(state.mask.sharers, state.agree.survivors)
    signed = sum(
        peer == me
        or (peer in request.signatures and cohort.signs(peer, request.signatures[peer], message))
        for peer in survivors.intersection(cohort.group(me))
    )
    if signed < cohort.threshold:
        _refuse(
            "too few signatures",
            f"{signed} of this peer's neighbors have signed the same survivors; "
            f"{cohort.threshold} are needed",
        )
    secrets = _secrets(state)
    pair = _own_shares(cohort, me, secrets)
    seeds, mask_keys = {me: pair[0]}, {}
    for peer in _neighbors_in(cohort, me, state.mask.sharers):
        text = _open_share(cohort, secrets, peer, me, state.mask.shares[peer])
        if peer in survivors:
            seeds[peer] = text[: shamir.SHARE_BYTES]
        else:
            mask_keys[peer] = text[shamir.SHARE_BYTES :]
    answer = UnmaskAnswer(cohort=cohort.id, seeds=seeds, keys=mask_keys)
    return replace(state, told=answer, master=_ERASED), answer


def check_rule(state: Turn, pins: Pins) -> None:
    """Raise SecureRefused if the owner's rule, as it is now, no longer allows this turn's sum."""
    if state.cohort is None:
        return
    cohort, name, peers = _cohort(state), "peers", tuple[str, ...]()
    if state.agree is not None:
        name, peers = "survivors", state.agree.survivors
    elif state.mask is not None:
        name, peers = "sharers", state.mask.sharers
    _check_set(state, cohort, set(peers or cohort.peers), pins, name)


def _secrets(state: Turn) -> keys.CardSecrets:
    if state.told is not None:
        _refuse("over", "this peer has taken its last step in this sum, and has deleted its keys")
    return keys.CardSecrets(state.master)


def _own_shares(cohort: Cohort, me: str, secrets: keys.CardSecrets) -> tuple[bytes, bytes]:
    place = cohort.place(me, me)
    places = range(place, place + 1)
    return secrets.split(cohort.id, cohort.threshold, places)[0]


def _open_share(
    cohort: Cohort, secrets: keys.CardSecrets, owner: str, me: str, sealed: bytes
) -> bytes:
    public = cohort.cards[owner].channel_key
    return keys.unseal(secrets.channel_key, public, cohort.id, (owner, me), sealed)


def _neighbors_in(cohort: Cohort, me: str, among: Collection[str]) -> list[str]:
    among = set(among)
    return [peer for peer in cohort.neighbors(me) if peer in among]


def _cohort(state: Turn, expected: bytes | None = None) -> Cohort:
    if state.cohort is None:
        _refuse("order", "the request is for a cohort that this peer has not joined")
    cohort = _open_checked(state.cohort)
    if expected is not None and cohort.id != expected:
        _refuse("second cohort", "the request is for another cohort than this peer has joined")
    return cohort


@functools.lru_cache(maxsize=1)
def _open_checked(request: ShareRequest) -> Cohort:
    """A cohort whose signatures this peer has verified; the next steps open it again."""
    return Cohort(request, is_checked=True)


def _check_cohort(state: Turn, cohort: Cohort, pins: Pins, layout: tuple[int, ...]) -> None:
    plan, ready, me = cohort.plan, state.ready, state.peer
    if cohort.signed.get(me) != state.card:
        _refuse("card", "the cohort does not have the card that this peer made for this turn")
    if (plan.fleet, plan.run, plan.round, plan.kind, plan.base) != (
        *(ready.fleet, ready.run, ready.round, ready.kind, ready.base),
    ):
        _refuse("plan", "the plan of the cohort is of another run, round, kind or version")
    if plan.sizes != layout:
        _refuse("plan", "the plan of the cohort is of another model")
    if plan.names != state.names:
        _refuse("plan", "the plan of the cohort has other metrics than this peer")
    _ = cohort.bits  # raises if the ring is too small for the weights
    _check_noise(state, cohort)
    _check_set(state, cohort, set(cohort.peers), pins, "peers")


def _check_noise(state: Turn, cohort: Cohort) -> None:
    """Raise SecureRefused if the noise of this peer's update would not be whole in the sum."""
    plan, noise = cohort.plan, state.noise
    if noise is None:
        if plan.divisor:
            _refuse("plan", "the plan is for shared noise, and this peer's update has none")
        return
    if plan.max_weight != 1:
        _refuse(
            "plan", "with shared noise all peers must have the same weight; the plan allows others"
        )
    examples, most = cohort.cards[state.peer].examples, ring.max_value(cohort.bits)
    if why := noise.objection(examples, plan.divisor, plan.sizes, plan.limits, plan.clip, most):
        _refuse("plan", f"the plan of the cohort would spoil the noise: {why}")


def _check_sharers(state: Turn, cohort: Cohort, request: MaskRequest, pins: Pins) -> None:
    sharers, me = set(request.sharers), state.peer
    if not in_order(request.sharers) or not sharers <= cohort.cards.keys():
        _refuse("sharers", "a sharer is not in the cohort, or is named twice")
    _check_set(state, cohort, sharers, pins, "sharers")
    secrets, expected = _secrets(state), _neighbors_in(cohort, me, sharers)
    if request.shares.keys() != set(expected):
        _refuse("sharers", "the request must contain one share of each neighbor that has shared")
    for peer in expected:
        text = _open_share(cohort, secrets, peer, me, request.shares[peer])
        if len(text) != 2 * shamir.SHARE_BYTES:
            raise BadMessage(f"the sealed message of {peer} does not contain two shares")


def _check_set(state: Turn, cohort: Cohort, peers: set[str], pins: Pins, name: str) -> None:
    """Raise SecureRefused unless a sum over these peers hides this peer's update."""
    me = state.peer
    if me not in peers:
        _refuse(name, f"this peer is not among the {name}, so its update does not count")
    group = peers.intersection(cohort.group(me))
    needed = cohort.threshold
    if len(group) < needed:
        _refuse(name, f"{len(group)} neighbors are among the {name}; {needed} are needed")
    known = peers & (pins.peers | {me})
    # Others may be the coordinator's. Fewer than 2t - n of them in a group learn nothing.
    whole = cohort.group(me)
    foreign, limit = len(set(whole) - pins.peers - {me}), 2 * needed - len(whole)
    if foreign >= limit:
        raise SecureRefused(
            "invented peers",
            f"{foreign} of the {len(whole)} peers that could unmask this one are not pinned here; "
            f"at most {max(0, limit - 1)} may be",
            "pin the ids of the peers whose owners you know",
        )
    hidden = cohort.together(me, known)
    if len(hidden) < pins.minimum:
        raise SecureRefused(
            "too few peers",
            f"{len(hidden)} pinned peers are among the {name}, with this one; the owner requires "
            f"{pins.minimum}",
            "pin the ids of further peers, or lower the minimum",
        )
    if state.noise is not None and len(hidden) < state.noise.peers:
        raise SecureRefused(
            "too little noise",
            f"{len(hidden)} pinned peers are among the {name}, with this one, and the noise of "
            f"this run is enough with {state.noise.peers}",
            "pin the ids of further peers; or run start --dp-shared with fewer",
        )


def _refuse(reason: str, message: str) -> NoReturn:
    raise SecureRefused(reason, message)
