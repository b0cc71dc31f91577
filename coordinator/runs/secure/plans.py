"""Makes the plan of a cohort: its peers, weights and limits. Pure but for `largest_changes`."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import UNSET

from coordinator.runs.options import SECURE_CLIP_NORM
from coordinator.runs.state import Run
from protocols.codecs import registry
from protocols.codecs.delta import FlatLayout
from protocols.model import weights
from protocols.model.bfloat16 import difference
from protocols.model.weights import Schema, WeightReader
from protocols.privacy.secagg import masked_file, ring
from protocols.privacy.secagg.cohort import open_card
from protocols.privacy.secagg.messages import (
    MAX_COHORT,
    Plan,
    ReadyAnswer,
    ShareRequest,
    SumKind,
    TailNames,
    encode,
    ring_of,
)
from protocols.privacy.shared_noise import SharedNoise

#: A limit allows a peer at least this many times the largest element of the mean.
_MIN_HEADROOM = 8.0
#: The smallest limit of a tensor, as a part of the clipping norm.
_MIN_LIMIT = 2.0**-20
#: Limits of a plan with shared noise are wider than needed by this factor.
_ROOM = 1.01
#: By ring: the most that all weights together should be, so that a value keeps 18 bits or 10; and
#: the smallest and largest weight of the peer with the most examples.
_WEIGHTS = {32: (4096, 16, 256), 16: (64, 1, 4)}


class Choice(NamedTuple):
    """The peers of a cohort, their names of metrics, and why the others are left out."""

    peers: tuple[str, ...]
    names: TailNames
    left_out: dict[str, tuple[str, str]]


def max_cohort(ring_bits: int) -> int:
    """The most peers of a cohort in this ring."""
    most = ((1 << (ring_bits - 1)) - 1) // ring.max_value(ring.MIN_VALUE_BITS)
    return min(MAX_COHORT, most)


def clip_of(run: Run) -> float:
    """The largest norm of a change."""
    return run.spec.clip_norm or SECURE_CLIP_NORM


def choose(run: Run, answers: Mapping[str, ReadyAnswer]) -> Choice:
    """The peers with the metrics and the terms that most peers have, and with keys of their own."""
    left_out: dict[str, tuple[str, str]] = {}
    counts = Counter(encode(answer.names) for answer in answers.values())
    most = max(counts, key=lambda names: (counts[names], names))
    cards = {peer: open_card(answer.card) for peer, answer in answers.items()}
    terms = Counter(card.terms for card in cards.values())
    most_terms = max(terms, key=lambda one: (terms[one], one))
    owners = Counter(key for card in cards.values() for key in {card.mask_key, card.channel_key})
    names = TailNames()
    for peer, answer in answers.items():
        card = cards[peer]
        if encode(answer.names) != most:
            why = "it reports other metrics than most peers"
            if not answer.names.metrics:
                why = "it has no metrics, as of too few held-out rows (data.min_count there)"
            left_out[peer] = ("other metrics", why)
        elif card.terms != most_terms:
            left_out[peer] = ("other settings", "its card is for other settings than most cards")
        elif card.mask_key == card.channel_key or any(
            owners[key] > 1 for key in (card.mask_key, card.channel_key)
        ):
            left_out[peer] = ("bad card", "another card has the same key")
        else:
            names = answer.names
    peers = [peer for peer in answers if peer not in left_out]
    limit = max_cohort(ring_of(run.spec.work_codec))

    def random_key(peer: str) -> bytes:
        return hashlib.sha256(f"{run.spec.seed} {run.round} {run.turn} {peer}".encode()).digest()

    for peer in sorted(peers, key=random_key)[limit:]:
        left_out[peer] = ("cohort is full", f"a secure sum has at most {limit} peers")
    return Choice(tuple(sorted(set(peers) - left_out.keys())), names, left_out)


def make_request(
    run: Run,
    kind: SumKind,
    fleet: str,
    answers: Mapping[str, ReadyAnswer],
    chosen: Choice,
    schema: Schema,
    limits: Sequence[float],
) -> ShareRequest:
    """The plan and the cards of the chosen peers. `limits`: of each tensor, for a training."""
    ring_bits = ring_of(run.spec.work_codec)
    examples = [run.updates[peer].num_examples for peer in chosen.peers]
    is_training = kind == "train"
    exact = is_training and run.spec.codec == registry.SUMS
    sizes = masked_file.layout(schema) if is_training else ()
    noise, divisor, clip = _shared_noise(run) if is_training else None, 0.0, clip_of(run)
    if noise is not None:
        divisor, most = sum(examples) / len(examples), max(examples)
        limits = [_ROOM * noise.largest(most) / divisor] * len(sizes)
        clip = _ROOM * noise.longest(most, sum(sizes)) / divisor
    plan = Plan(
        fleet=fleet,
        run=run.id,
        round=run.round,
        kind=kind,
        base=run.head,
        ring=ring_bits,  # type: ignore[arg-type]
        sizes=sizes,
        limits=tuple(limits) if is_training else (),
        clip=clip,
        names=chosen.names,
        max_weight=1 if divisor or exact else _max_weight(run, ring_bits, len(examples)),
        max_examples=_max_examples(examples, run.spec.max_weight_share),
        divisor=divisor,
        exact=exact or UNSET,
    )
    return ShareRequest(plan=encode(plan), cards=tuple(answers[peer].card for peer in chosen.peers))


def _shared_noise(run: Run) -> SharedNoise | None:
    """What each peer adds if peers share the noise, with the largest learning rate of the run."""
    private = run.spec.private
    if private is None or not private.is_shared:
        return None
    return SharedNoise.of(private.shared_event(float(run.spec.settings["lr"])))


def _max_weight(run: Run, ring_bits: int, peers: int) -> int:
    """The integer weight of the peer with the most examples."""
    if run.spec.weighting == "equal":
        return 1
    total, least, most = _WEIGHTS[ring_bits]
    return max(least, min(most, total // peers))


def _max_examples(examples: Sequence[int], cap: float) -> int:
    """The most examples that count of a peer, so that no share exceeds `cap`; 0 for no limit."""
    cap = max(cap, 1.0 / len(examples))
    ascending, below = sorted(examples), 0
    for rank, number in enumerate(ascending):
        above = len(ascending) - rank
        # `above` peers count alike, as `limit`: limit / (below + above * limit) = cap.
        if number > cap * (below + above * number):
            room = 1.0 - cap * above
            return max(1, int(cap * below / room))
        below += number
    return 0


def tensor_limits(run: Run, schema: Schema, largest: Sequence[float]) -> list[float]:
    """The clipping limit of each tensor, from the largest change of the last version, if known."""
    clip = clip_of(run)
    sizes = masked_file.layout(schema)
    if len(largest) != len(sizes):
        return [clip] * len(sizes)
    room = headroom(len(run.history[-1].contributors) if run.history else 0)
    return [min(clip, max(room * value, _MIN_LIMIT * clip)) for value in largest]


def headroom(peers: int) -> float:
    """By which factor an element of one peer may exceed the largest element of a mean of `peers`.

    If peers' changes differ at random, the mean is smaller by the square root of their number, and
    so is its rounding error. So this headroom costs no accuracy.
    """
    return max(_MIN_HEADROOM, 2.0 * math.sqrt(peers))


def largest_changes(new: WeightReader, old: WeightReader) -> list[float]:
    """By averaged tensor, in the order of a plan: the largest absolute change of an element."""
    found = dict.fromkeys(FlatLayout(new.schema).fields, 0.0)
    for piece in weights.split_into_pieces(new.schema):
        for part in piece:
            if part.name not in found:
                continue
            dtype = new.schema[part.name].dtype
            change = np.abs(difference(new.read(part), old.read(part), dtype))
            found[part.name] = max(found[part.name], float(change.max()))
    return list(found.values())
