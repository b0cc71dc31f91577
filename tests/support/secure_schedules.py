"""Random schedules of secure sums, and what must hold in each of them.

    python -m tests.support.secure_schedules --honest 0 1000 --hostile 0 1000

`play_honest` loses, repeats and reorders messages and restarts both sides, which keep what is on
their disks. `play_hostile` is a coordinator with invented peers that asks for whatever it likes.
Each schedule follows from its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import msgspec
import numpy as np
import pytest

from agent.home.secure_store import TurnKey
from coordinator.runs import transitions
from coordinator.runs.secure.sum_files import SumFiles
from coordinator.runs.state import CohortState, Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec, Update
from protocols.enrollment import identity
from protocols.errors import BadMessage, CohortLost, SecureRefused, UsageError
from protocols.messages.states import RunState
from protocols.privacy.secagg import cohort as cohort_module
from protocols.privacy.secagg import keys, peer
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.cohort import Cohort, Pins, threshold
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    AgreeAnswer,
    AgreeRequest,
    Answer,
    MaskAnswer,
    MaskRequest,
    ReadyRequest,
    Request,
    ShareAnswer,
    ShareRequest,
    SignedCard,
    UnmaskAnswer,
    UnmaskRequest,
    encode,
)
from tests.support.secure_cohort import (
    BASE,
    FLEET,
    NAMES,
    RUN,
    SIZES,
    Died,
    Machine,
    me,
    plain_sum,
    plan,
    secure_sum,
    share_request,
)

REFUSALS = (SecureRefused, BadMessage, UsageError)


class Witness:
    """Sees every answer that leaves a peer, and raises AssertionError for one too many."""

    def __init__(self) -> None:
        self.cohorts: dict[tuple[str, TurnKey], set[bytes]] = defaultdict(set)
        self.masked: dict[tuple[str, TurnKey], set[tuple[bytes, str]]] = defaultdict(set)
        self.signed: dict[tuple[str, TurnKey], set[bytes]] = defaultdict(set)
        #: By peer, cohort and owner: the kinds of share that were told.
        self.told: dict[tuple[str, bytes, str], set[str]] = defaultdict(set)

    def see(self, who: str, key: TurnKey, answer: Answer) -> None:
        turn = who, key
        match answer:
            case ShareAnswer():
                self.cohorts[turn].add(answer.cohort)
                assert len(self.cohorts[turn]) == 1, "one card in two cohorts"
            case MaskAnswer():
                self.masked[turn].add((answer.cohort, answer.digest))
                assert len(self.masked[turn]) == 1, "two masked updates with one card"
            case AgreeAnswer():
                self.signed[turn].add(answer.signature)
                assert len(self.signed[turn]) == 1, "two sets of survivors signed"
            case UnmaskAnswer():
                for kind, told in (("seed", answer.seeds), ("key", answer.keys)):
                    for owner in told:
                        kinds = self.told[who, answer.cohort, owner]
                        kinds.add(kind)
                        assert len(kinds) == 1, "both kinds of share of one peer"


# --- an honest coordinator over a bad network ------------------------------------------------


class Site:
    """The coordinator of one cohort: its ledger, its spool, and what it has in memory."""

    def __init__(self, request: ShareRequest, turn: int) -> None:
        self._spool = {"request": encode(request)}
        #: Masked updates whose answers have arrived, and why some of them do not count.
        self.acknowledged: set[tuple[str, str]] = set()
        self.refused: dict[tuple[str, str], str] = {}
        peers = tuple(sorted(Cohort(request, is_checked=True).cards))
        spec = RunSpec(task="t", rounds=1, quorum=2, secure=True)
        cards = {name: Update(num_examples=1) for name in peers}
        self.run = Run(
            id=RUN, spec=spec, state=RunState.AGGREGATING, round=1, turn=turn, updates=cards
        )
        self._record(run_events.CohortFixed(1, turn, "train", peers, "request"))
        self.restart()

    def read(self, owner: str, digest: str) -> bytes:
        """A file of the spool."""
        return self._spool[digest]

    def restart(self) -> None:
        self._files = SumFiles(self)  # type: ignore[arg-type]

    @property
    def cohort(self) -> CohortState:
        assert self.run.cohort is not None
        return self.run.cohort

    @property
    def state(self) -> Aggregator:
        return self._files.open(self.cohort)

    def _record(self, event: RunEvent) -> None:
        self.run = transitions.apply(self.run, event)

    def take(self, name: str, answer: Answer) -> None:
        if not isinstance(answer, MaskAnswer):
            self.state.take(name, answer)
            return
        update = name, answer.digest
        self.acknowledged.add(update)
        if "mask" in self.run.open_kinds:
            self._record(run_events.MaskedUpdateAccepted(1, *update, answer.nbytes))
        elif update not in self.cohort.masked.items():
            self.refuse(update)

    def refuse(self, update: tuple[str, str]) -> None:
        self.refused[update] = "late"

    def decide(self) -> None:
        state = self.state
        if not state.sharers:
            sharers = state.fix_sharers().sharers
            self._spool["shares"] = encode({name: state.shares[name] for name in sharers})
            self._record(run_events.SharersFixed(1, sharers, "shares"))
        else:
            self._record(run_events.SurvivorsFixed(1, state.fix_survivors().survivors))

    def lose(self, because: str) -> None:
        for update in self.acknowledged:
            self.refused.setdefault(update, because)
        self._record(run_events.CohortLost(1, because))

    def check_accounts(self) -> None:
        """Each acknowledged update counts once, or is refused with its reason."""
        run = self.run
        counted = Counter((name, self.cohort.masked[name]) for name in run.contributors)
        assert counted.keys() <= self.acknowledged, "the sum has an update that nobody sent"
        for update in self.acknowledged:
            told = counted[update] + bool(self.refused.get(update))
            assert told == 1, f"an acknowledged update counts {counted[update]} times"


#: In a third of all schedules, more peers than this form a ring with this many neighbors each.
SMALL_RING = 4


def _is_ring(seed: int) -> bool:
    return seed % 3 == 0


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[None]:
    """Small rings; checks of signatures, exchanges of keys and cohorts are computed once."""

    def neighbor_count(peers: int) -> int:
        return min(SMALL_RING, peers - 1) if _is_ring(seed) else peers - 1

    with (
        mock.patch.object(cohort_module, "neighbor_count", neighbor_count),
        mock.patch.object(peer, "Cohort", functools.lru_cache(512)(Cohort)),
        mock.patch.object(identity, "verify", functools.lru_cache(4096)(identity.verify)),
        mock.patch.object(keys, "exchange", functools.lru_cache(4096)(keys.exchange)),
        mock.patch.object(keys, "CardSecrets", functools.lru_cache(256)(keys.CardSecrets)),
    ):
        yield


def play_honest(seed: int) -> str:
    """Returns "sum" or "lost" after up to three turns; raises AssertionError for a wrong sum.

    If the coordinator waits for all that are alive, and no more died than the threshold allows,
    the first turn gives the sum.
    """
    with simulated(seed):
        return _play_honest(seed)


def _play_honest(seed: int) -> str:
    rnd, witness = random.Random(seed), Witness()
    size = rnd.choice((7, 8, 9) if _is_ring(seed) else (3, 3, 4, 5, 6, 7))
    pins = Pins(frozenset(me(number).peer for number in range(size)), 2)
    machines = {(one := Machine(number, pins, rnd)).peer: one for number in range(size)}
    alive = set(machines)
    # Half of all schedules lose as many peers for good as the threshold allows, and some more.
    group = min(SMALL_RING + 1, size) if _is_ring(seed) else size
    bearable = group - threshold(group)
    mortal, hurry = rnd.choice((0, 0, bearable, size)), rnd.choice((0, 0.005))
    must_succeed = mortal <= bearable and not hurry
    for turn in range(3):
        key = TurnKey(RUN, 1, turn)
        cards = [_insist(rnd, machines[name], key) for name in sorted(alive)]
        if len(cards) < 3:
            return "lost"
        site = Site(share_request(cards, plan(rnd.choice((16, 32)), max_weight=4)), turn)
        try:
            mortal = _play_turn(rnd, site, machines, alive, key, witness, mortal, hurry)
        except CohortLost as err:
            assert not must_succeed, "the cohort was lost without need"
            site.lose(err.message)
            site.check_accounts()
            continue
        site.check_accounts()
        survivors = [machines[name] for name in site.run.contributors]
        secure, plain = (
            secure_sum(site.state, machines),
            plain_sum(site.state.cohort, survivors, key),
        )
        assert secure.digest == plain.digest, "the sum is wrong"
        assert np.allclose(secure.metrics, plain.metrics, atol=1e-4), "the metrics are wrong"
        return "sum"
    return "lost"


def _insist(rnd: random.Random, machine: Machine, key: TurnKey) -> SignedCard:
    machine.store.dies = rnd.choice(("", "", "before", "after"))
    try:
        return machine.card(key)
    except Died:
        return machine.card(key)


def _play_turn(
    rnd: random.Random,
    site: Site,
    machines: dict[str, Machine],
    alive: set[str],
    key: TurnKey,
    witness: Witness,
    mortal: int,
    hurry: float,
) -> int:
    ahead: list[tuple[str, Request | Answer]] = []
    for _ in range(2000):
        state = site.state
        if state.can_recover():
            return mortal
        move = rnd.random()
        if move < 0.005:
            site.restart()
        elif move < 0.03 and mortal and alive:
            alive.discard(rnd.choice(sorted(alive)))
            mortal -= 1
        elif move < 0.45 and len(ahead) < 12:
            name = rnd.choice(state.cohort.peers)
            if (request := state.request_for(name)) is not None:
                ahead.append((name, request))
        elif ahead:
            name, message = ahead.pop(rnd.randrange(len(ahead)))
            if rnd.random() < 0.15:
                ahead.append((name, message))  # it comes again later
            if rnd.random() < 0.1:
                continue  # lost on its way
            if isinstance(message, ShareRequest | MaskRequest | AgreeRequest | UnmaskRequest):
                if name in alive and (answer := _ask_again(rnd, machines[name], message, key)):
                    witness.see(name, key, answer)
                    ahead.append((name, answer))
            else:
                try:
                    site.take(name, message)
                except BadMessage:
                    # Only an answer from before a decision does not fit any more.
                    assert isinstance(message, AgreeAnswer | UnmaskAnswer)
        hurries = rnd.random() < hurry
        if len(ahead) > 2 and not hurries:
            continue  # the coordinator looks later whether anybody is still to answer
        state = site.state  # a restart loses the shares that were not yet fixed
        waits = any(state.request_for(name) is not None for name in alive)
        if not state.survivors and (not waits or hurries):
            site.decide()
        elif state.survivors and not waits and not ahead and not state.can_recover():
            raise CohortLost("no peer is left to ask")
    raise AssertionError("the cohort comes to no end")


def _ask_again(
    rnd: random.Random, machine: Machine, request: Request, key: TurnKey
) -> Answer | None:
    """The answer; None also for one of the first steps that comes after the last one."""
    is_over = machine.store.turns[key].told is not None
    if is_over and isinstance(request, ShareRequest | MaskRequest):
        with pytest.raises(SecureRefused, match="has taken its last step"):
            _ask(rnd, machine, request, key)
        return None
    return _ask(rnd, machine, request, key)


def _ask(rnd: random.Random, machine: Machine, request: Request, key: TurnKey) -> Answer | None:
    if rnd.random() < 0.1:
        machine.store.dies = rnd.choice(("before", "after"))
    try:
        return machine.answer(request, key)
    except Died:
        return None
    finally:
        machine.store.dies = ""


# --- a hostile coordinator -------------------------------------------------------------------


class Target(Machine):
    """A machine of which only the keys matter: its masks are not added to any update."""

    def _keep(self, masking: peer.Masking) -> tuple[str, int]:
        seeds = b"".join((*masking.plus, b"-", *masking.minus))
        return hashlib.sha256(seeds).hexdigest(), len(seeds)


class Hostile:
    """A coordinator with `invented` peers, which knows their keys, and asks at random."""

    def __init__(self, seed: int) -> None:
        self.rnd = rnd = random.Random(seed)
        complete = ((3, 2), (3, 3), (4, 2), (4, 3), (5, 3), (6, 3))
        rings = ((6, 3), (7, 4), (8, 5), (9, 3))
        size, self.minimum = rnd.choice(rings if _is_ring(seed) else complete)
        invented = rnd.choice((0, 1, 1, 2, 4))
        pins = Pins(frozenset(me(number).peer for number in range(size)), self.minimum)
        self.machines = {(one := Target(number, pins, rnd)).peer: one for number in range(size)}
        self.own = [me(100 + number) for number in range(invented)]
        self.cards: dict[str, list[SignedCard]] = defaultdict(list)
        self.own_turns: dict[SignedCard, peer.Turn] = {}
        self.cohorts: dict[bytes, Cohort] = {}
        self.sealed: dict[bytes, dict[str, dict[str, bytes]]] = defaultdict(dict)
        self.masks: list[MaskRequest] = []
        self.agrees: list[tuple[MaskRequest, AgreeRequest]] = []
        self.signatures: dict[bytes, dict[str, bytes]] = defaultdict(dict)
        #: By cohort, owner and kind: what each holder's share says.
        self.known: dict[tuple[bytes, str, str], dict[str, bytes]] = defaultdict(dict)
        self.witness, self.done = Witness(), Counter[str]()

    def play(self, moves: int = 60) -> Counter[str]:
        """Make random moves; raises AssertionError if an invariant breaks."""
        for _ in range(2):
            self.ready()
        steps = (self.ready, self.fix, self.mask, self.agree, self.unmask)
        for _ in range(moves):
            self.rnd.choices(steps, (1, 6, 6, 6, 6))[0]()
        self.check()
        return self.done

    def _key(self) -> TurnKey:
        return TurnKey(RUN, 1, 0 if self.rnd.random() < 0.9 else 1)

    def _some(self, things: tuple[str, ...]) -> tuple[str, ...]:
        """Mostly all, else all but some."""
        left = 0 if self.rnd.random() < 0.7 else self.rnd.randrange(1, max(2, len(things) // 2))
        gone = set(self.rnd.sample(things, min(left, len(things))))
        return tuple(one for one in things if one not in gone)

    def ready(self) -> None:
        key, base = self._key(), BASE if self.rnd.random() < 0.95 else "cd" * 32
        for machine in self.machines.values():
            if self.rnd.random() < 0.9:
                try:
                    self._keep(machine.card(key, base))
                except (Died, *REFUSALS):
                    self.done["refused ready"] += 1
        request = ReadyRequest(fleet=FLEET, run=RUN, round=1, turn=0, base=base)
        for own in self.own:
            turn = peer.make_card(own, request, 50, self.rnd.randbytes(32), NAMES)
            self.own_turns[turn.card] = turn
            self._keep(turn.card)

    def _keep(self, card: SignedCard) -> None:
        known = SIGNED_CARD.decode(card.card)
        if card not in self.cards[known.peer]:
            self.cards[known.peer].append(card)
        if self.rnd.random() < 0.04 and self.own:  # another key under an honest name
            own = self.rnd.choice(self.own)
            fake = msgspec.structs.replace(known, mask_key=self.rnd.randbytes(32))
            if self.rnd.random() < 0.5:
                fake = msgspec.structs.replace(fake, public=own.public)
            self.cards[known.peer].append(SignedCard(*SIGNED_CARD.seal(fake, own.sign)))

    def fix(self) -> None:
        """A cohort of one card for each of some peers, mostly the newest, and its shares."""
        by_peer = self.cards
        names = self._some(tuple(sorted(by_peer)))
        if self.cohorts and self.rnd.random() < 0.5:  # the same once more
            request = self.rnd.choice(list(self.cohorts.values())).request
        else:
            cards = [
                by_peer[name][-1] if self.rnd.random() < 0.8 else self.rnd.choice(by_peer[name])
                for name in names
            ]
            request = share_request(cards, plan(max_weight=self.rnd.choice((1, 4))))
        try:
            cohort = Cohort(request, is_checked=True)
        except REFUSALS:
            return
        self.cohorts[cohort.id] = cohort
        everyone = Pins(frozenset(cohort.peers), 0)
        for name in self._some(cohort.peers):
            answer: ShareAnswer | None = None
            if name in self.machines:
                key = self._key_of(cohort, name)
                answer = self._answer(name, request, key)  # type: ignore[assignment]
            elif own := self.own_turns.get(cohort.signed[name]):
                try:
                    answer = peer.share(own, request, everyone, SIZES)[1]
                except REFUSALS:
                    return
            if answer:
                self.sealed[cohort.id][name] = dict(answer.shares)
                self._open_for_own(cohort, name, answer)

    def _key_of(self, cohort: Cohort, name: str) -> TurnKey:
        card = cohort.cards[name]
        return TurnKey(card.run, card.round, card.turn)

    def _open_for_own(self, cohort: Cohort, owner: str, answer: ShareAnswer) -> None:
        for holder in cohort.neighbors(owner):
            if own := self.own_turns.get(cohort.signed[holder]):
                text = peer._open_share(
                    cohort, keys.CardSecrets(own.master), owner, holder, answer.shares[holder]
                )
                self.known[cohort.id, owner, "seed"][holder] = text[:33]
                self.known[cohort.id, owner, "key"][holder] = text[33:]

    def mask(self) -> None:
        ready = [one for one, sealed in self.sealed.items() if len(sealed) > 1]
        if not ready:
            return
        cohort = self.cohorts[self.rnd.choice(ready)]
        sealed = self.sealed[cohort.id]
        sharers = self._some(tuple(sorted(sealed)))
        for name in self._some(cohort.peers):
            mine = sharers if self.rnd.random() < 0.8 else self._some(tuple(sorted(sealed)))
            neighbors = set(mine).intersection(cohort.neighbors(name))
            shares = {one: sealed[one][name] for one in sorted(neighbors)}
            request = MaskRequest(cohort=cohort.id, sharers=mine, shares=shares)
            self.masks.append(request)
            if name in self.machines:
                self._answer(name, request, self._key_of(cohort, name))

    def agree(self) -> None:
        if not self.masks:
            return
        mask = self.rnd.choice(self.masks[-8:])
        cohort, survivors = self.cohorts[mask.cohort], self._some(mask.sharers)
        for name in self._some(mask.sharers):
            mine = survivors if self.rnd.random() < 0.8 else self._some(mask.sharers)
            request = AgreeRequest(cohort=mask.cohort, survivors=mine)
            self.agrees.append((mask, request))
            message = cohort.agreement(mask.sharers, mine)
            if name in self.machines:
                answer = self._answer(name, request, self._key_of(cohort, name))
                if isinstance(answer, AgreeAnswer):
                    self.signatures[message][name] = answer.signature
            for own in self.own:
                self.signatures[message][own.peer] = own.sign(message)

    def unmask(self) -> None:
        if not self.agrees:
            return
        mask, agree = self.rnd.choice(self.agrees[-12:])
        cohort = self.cohorts[mask.cohort]
        signatures = dict(self.signatures[cohort.agreement(mask.sharers, agree.survivors)])
        for other in self.rnd.sample(list(self.signatures.values()), min(1, len(self.signatures))):
            signatures = {**other, **signatures}
        request = UnmaskRequest(cohort=mask.cohort, signatures=signatures)
        for name in self._some(cohort.peers):
            if name in self.machines:
                answer = self._answer(name, request, self._key_of(cohort, name))
                if isinstance(answer, UnmaskAnswer):
                    for kind, told in (("seed", answer.seeds), ("key", answer.keys)):
                        for owner, share in told.items():
                            self.known[cohort.id, owner, kind][name] = share

    def _answer(self, name: str, request: Request, key: TurnKey) -> Answer | None:
        kind = type(request).__name__
        try:
            answer = _ask(self.rnd, self.machines[name], request, key)
        except REFUSALS as err:
            self.done[f"refused {kind}: {getattr(err, 'reason', 'bad')}"] += 1
            return None
        if answer is None:
            return None
        self.witness.see(name, key, answer)
        self.done[kind] += 1
        return answer

    # --- what the coordinator knows in the end ---

    def check(self) -> None:
        """No secret is known in both kinds, and no sum over fewer peers than owners want."""
        for cohort in self.cohorts.values():
            open_seeds, open_keys = (
                {
                    owner
                    for owner in cohort.peers
                    if len(self.known[cohort.id, owner, kind]) >= cohort.threshold
                }
                for kind in ("seed", "key")
            )
            honest = {name for name in cohort.peers if name in self.machines}
            both = open_seeds & open_keys & honest
            assert not both, f"both secrets of {both}"
            for known in self._open_sums(cohort, open_seeds, open_keys):
                self.done["sum known"] += 1
                assert len(known) >= self.minimum, f"the sum of {len(known)} peers is known"

    def _open_sums(
        self, cohort: Cohort, open_seeds: set[str], open_keys: set[str]
    ) -> Iterator[set[str]]:
        """The groups of honest peers whose masked updates add up to an unmasked sum."""
        masked: dict[str, set[str]] = {}
        for name, machine in self.machines.items():
            for turn in machine.store.turns.values():
                if turn.upload and turn.mask is not None and turn.mask.cohort == cohort.id:
                    masked[name] = set(turn.mask.sharers).intersection(cohort.neighbors(name))
        left = set(masked)
        while left:
            group, ahead = set[str](), [left.pop()]
            is_open = True
            while ahead:
                name = ahead.pop()
                group.add(name)
                is_open &= name in open_seeds
                for other in masked[name]:
                    if other in self.machines and not {name, other} & open_keys:
                        # A mask that only one of the two has added stays in the sum.
                        is_open &= name in masked.get(other, ())
                        if other in left:
                            left.discard(other)
                            ahead.append(other)
            if is_open:
                yield group


def play_hostile(seed: int) -> Counter[str]:
    """Play one schedule; returns what happened, for a look at how far schedules come."""
    with simulated(seed):
        return Hostile(seed).play()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--honest", nargs=2, type=int, default=(0, 0))
    parser.add_argument("--hostile", nargs=2, type=int, default=(0, 0))
    args = parser.parse_args()
    for name, play, seeds in (
        ("honest", play_honest, range(*args.honest)),
        ("hostile", play_hostile, range(*args.hostile)),
    ):
        done, start = Counter[str](), time.perf_counter()
        for seed in seeds:
            try:
                result = play(seed)
            except Exception as err:
                err.add_note(f"{name} schedule {seed}")
                raise
            done.update(result if isinstance(result, Counter) else [result])
        print(f"{name}: {len(seeds)} schedules, {time.perf_counter() - start:.0f} s: {dict(done)}")


if __name__ == "__main__":
    main()
