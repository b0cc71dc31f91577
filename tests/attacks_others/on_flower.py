"""Attacks on the secure aggregation of Flower, in an environment that has `flwr`.

Clients are Flower's `secaggplus_mod` with a context each, in this process. The attacker is the
server. It knows what Flower's server knows, the number of examples of each client included.

    python -m tests.attacks_others.on_flower [--full]
"""

from __future__ import annotations

import argparse
import time
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
)
from flwr.supercore.task_identity import TaskIdentity

from tests.attacks_others.measures import (
    BOTH_SHARES,
    SEEDS,
    Finding,
    Ring,
    Target,
    first_outputs,
    free_bits,
    search,
    tell,
)

#: The defaults of SecAggPlusWorkflow.
CLIP, TARGET_RANGE, MOD_RANGE, MAX_WEIGHT = 8.0, 4194304, 4294967296, 1000.0
ELEMENTS, EXAMPLES, THRESHOLD = 1000, 100, 2
#: The victim has the largest node id, so it adds each pair mask.
OTHER, THIRD, VICTIM = 10, 20, 30
SLICE_BITS = 20
#: Keys of pairs that are made to see which bits of a seed are free.
SAMPLES = 64


class Client:
    """Flower's client mod with a state and an update of its own."""

    def __init__(self, node: int, rnd: np.random.Generator) -> None:
        self.node = node
        self.update = rnd.normal(0, 0.05, ELEMENTS).astype(np.float32)
        self.context = Context(
            run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}
        )

    def answer(self, stage: str, **configs: Any) -> dict[str, Any]:
        """What this client answers to the server at one stage."""
        record = ConfigRecord({**configs, Key.STAGE: stage})
        content = RecordDict({RECORD_KEY_CONFIGS: record})
        message = Message(
            content=content, dst_node_id=self.node, message_type=MessageType.TRAIN, group_id="1"
        )
        reply = secaggplus_mod(message, self.context, self._train)
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def _train(self, message: Message, context: Context) -> Message:
        parameters = ndarrays_to_parameters([self.update])
        result = FitRes(Status(Code.OK, ""), parameters, EXAMPLES, {})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)


class Cohort:
    """Three clients after the stages setup and share keys; `masked` by those that upload."""

    def __init__(self, uploading: tuple[int, ...]) -> None:
        rnd = np.random.default_rng(0)
        self.clients = {node: Client(node, rnd) for node in (OTHER, THIRD, VICTIM)}
        settings = {
            Key.SAMPLE_NUMBER: 3,
            Key.SHARE_NUMBER: 3,
            Key.THRESHOLD: THRESHOLD,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: TARGET_RANGE,
            Key.MOD_RANGE: MOD_RANGE,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
        told = {n: one.answer(Stage.SETUP, **settings) for n, one in self.clients.items()}
        self.public = {
            n: [keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2]] for n, keys in told.items()
        }
        public = {str(node): keys for node, keys in self.public.items()}
        sealed: dict[int, list[tuple[int, bytes]]] = {node: [] for node in self.clients}
        for node, client in self.clients.items():
            shares = client.answer(Stage.SHARE_KEYS, **public)
            for to, text in zip(
                shares[Key.DESTINATION_LIST], shares[Key.CIPHERTEXT_LIST], strict=True
            ):
                sealed[to].append((node, text))
        self.masked: dict[int, Ring] = {}
        for node in uploading:
            sources, texts = zip(*sealed[node], strict=True)
            configs = {Key.SOURCE_LIST: [*sources], Key.CIPHERTEXT_LIST: [*texts]}
            upload = self.clients[node].answer(Stage.COLLECT_MASKED_VECTORS, **configs)
            arrays = [bytes_to_ndarray(data) for data in upload[Key.MASKED_PARAMETERS]]
            self.masked[node] = np.concatenate(arrays).astype(np.uint32)

    def secrets(self, active: list[int], dead: list[int], asked: tuple[int, ...]) -> list[bytes]:
        """The secrets of all nodes listed, from what the asked clients tell at stage unmask."""
        shares: list[list[bytes]] = [[] for _ in (*active, *dead)]
        for node in asked:
            configs = {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead}
            told = self.clients[node].answer(Stage.UNMASK, **configs)
            assert told[Key.NODE_ID_LIST] == [*active, *dead]
            for place, share in enumerate(told[Key.SHARE_LIST]):
                shares[place].append(share)
        return [combine_shares(some) for some in shares]

    def pair_key(self, private: bytes, node: int) -> bytes:
        """The seed of the mask between the owner of a private key and a node."""
        public = bytes_to_public_key(self.public[node][0])
        return generate_shared_key(bytes_to_private_key(private), public)


def mask_of(seed: bytes) -> Ring:
    """Flower's mask of a seed, for the factor and the update."""
    arrays = pseudo_rand_gen(seed, MOD_RANGE, [(1,), (ELEMENTS,)])
    return np.concatenate(arrays).astype(np.uint32)


def fold(seed: bytes) -> int:
    """The number that Flower's `pseudo_rand_gen` makes of a seed."""
    words = np.frombuffer(seed, "<u4").tolist()
    return reduce(lambda one, other: one ^ other, words)


def error_of(plain: Ring, update: npt.NDArray[np.float32]) -> float:
    """The largest difference between an update and what was recovered, in steps of rounding."""
    ratio = round(EXAMPLES / MAX_WEIGHT * TARGET_RANGE) / TARGET_RANGE
    step = 2 * CLIP / TARGET_RANGE
    values = plain[1:].astype(np.float64) * step - CLIP
    return float(np.abs(values - update * ratio).max() / step)


class Space(NamedTuple):
    """The numbers that seeds of pairs fold to: which bits are free, and the others."""

    free: list[int]
    fixed: int

    def spread(self, numbers: npt.NDArray[np.uint64]) -> Ring:
        """The seeds uint32[n] of numbers from 0 to 2^bits - 1."""
        seeds = np.full(len(numbers), self.fixed, np.uint32)
        for place, bit in enumerate(self.free):
            seeds |= ((numbers >> np.uint64(place)) & np.uint64(1)).astype(np.uint32) << np.uint32(
                bit
            )
        return seeds

    def number(self, seed: int) -> int:
        return sum(((seed >> bit) & 1) << place for place, bit in enumerate(self.free))


def seed_space() -> Space:
    """Which bits are free, from keys that Flower's functions make."""
    folded = []
    for _ in range(SAMPLES):
        (private, _), (_, public) = generate_key_pairs(), generate_key_pairs()
        folded.append(fold(generate_shared_key(private, public)))
    count = free_bits([seed.to_bytes(4, "big") for seed in folded])
    differ = reduce(lambda one, other: one | other, (seed ^ folded[0] for seed in folded))
    free = [bit for bit in range(32) if differ >> bit & 1]
    assert len(free) == count
    return Space(free, folded[0] & ~differ)


def try_seeds(full: bool) -> Finding:
    """One client drops out after it has shared its keys; the server follows the protocol.

    It learns the own masks of the two others, and the pair masks of the client that is gone. One
    pair mask then hides the update of the victim.
    """
    cohort = Cohort(uploading=(THIRD, VICTIM))
    _, own, gone = cohort.secrets([THIRD, VICTIM], [OTHER], asked=(THIRD, VICTIM))
    left = cohort.masked[VICTIM] - mask_of(own) - mask_of(cohort.pair_key(gone, VICTIM))
    # The factor follows from the number of examples. Elements are rounded to TARGET_RANGE values.
    low, width = np.zeros(ELEMENTS + 1, np.int64), np.full(ELEMENTS + 1, TARGET_RANGE, np.uint32)
    low[0], width[0] = round(EXAMPLES / MAX_WEIGHT * TARGET_RANGE), 0
    space = seed_space()
    numbers = range(2 ** len(space.free))
    if not full:
        # Where to look: the attacker does not know this, and so searches everything.
        state = cohort.clients[VICTIM].context.state.config_records["secaggplus_state"]
        secret = fold(cohort.pair_key(state["sk1"], THIRD))  # type: ignore[arg-type]
        begin = space.number(secret) >> SLICE_BITS << SLICE_BITS
        numbers = range(begin, begin + 2**SLICE_BITS)
    spread = space.spread

    def whole(number: int) -> Ring:
        (seed,) = spread(np.array([number], np.uint64)).tolist()
        return mask_of(seed.to_bytes(4, "little"))

    began, cpu = time.monotonic(), time.process_time()
    target = Target(left, low, width)
    found = [*search(target, numbers, lambda some: first_outputs(spread(some)), whole)]
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    steps = [error_of(left - whole(one), cohort.clients[VICTIM].update) for one in found]
    works = len(found) == 1 and steps[0] <= 1.01
    place = "" if full else " around the true one"
    all_of_it = cpu * 2 ** len(space.free) / len(numbers)
    return Finding(
        SEEDS,
        works,
        f"{len(space.free)} bits of a seed are free; {len(numbers):,} seeds tried{place} in "
        f"{took:.1f} s ({cpu:.1f} s CPU), all take {all_of_it / 60:.1f} min CPU of one core"
        + ("; the update is recovered to the rounding" if works else f"; found {len(found)}"),
    )


def ask_for_both_shares() -> Finding:
    """All clients upload. The server names the victim as active and as dead in one request."""
    cohort = Cohort(uploading=(OTHER, THIRD, VICTIM))
    try:
        *_, own, private = cohort.secrets([OTHER, THIRD, VICTIM], [VICTIM], asked=(OTHER, THIRD))
    except (KeyError, ValueError) as err:
        return Finding(BOTH_SHARES, False, f"refused: {err}")
    plain = cohort.masked[VICTIM] - mask_of(own)
    for node in (OTHER, THIRD):
        plain -= mask_of(cohort.pair_key(private, node))
    steps = error_of(plain, cohort.clients[VICTIM].update)
    return Finding(
        BOTH_SHARES,
        steps <= 1.01,
        "two clients answered one request with both; the update is recovered to the rounding",
    )


def main() -> None:
    # Flower sets these where a server makes a message.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="try every seed")
    tell("flwr", [try_seeds(parser.parse_args().full), ask_for_both_shares()])


if __name__ == "__main__":
    main()
