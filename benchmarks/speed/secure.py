"""What secure aggregation costs: python -m benchmarks.speed.secure [--large]

Times are seconds of one thread's CPU, which other programs on the machine disturb less than the
clock. Files lie in a temporary folder. `--large` adds a cohort of 1,000 peers, which takes minutes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from protocols.model.weights import Part, Weights, header_bytes, split_into_pieces
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import masked_file, ring
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.masks import add_masks
from protocols.privacy.secagg.messages import MaskRequest
from protocols.privacy.secagg.recovery import recover
from protocols.privacy.secagg.turn import Masking
from tests.support.secure_cohort import KEY, Machine, me, plan, run_cohort, share_request

ELEMENTS = 10_000_000


@contextmanager
def measured(what: str) -> Iterator[None]:
    start = time.thread_time()
    yield
    print(f"{what}: {time.thread_time() - start:.2f} s")


def mask_a_model(peers: int, ring_bits: int) -> None:
    """Mask 40 MB at each of `peers`, and read the mean of all of them."""
    base = Weights({"w": np.zeros(ELEMENTS, np.float32)})
    draw = np.random.default_rng(0)
    trained = Weights({"w": draw.normal(0, 0.01, ELEMENTS).astype(np.float32)})
    pins = Pins(frozenset(me(number).peer for number in range(peers)))
    machines = [Machine(number, pins, random.Random(number), (1,)) for number in range(peers)]
    cards = [machine.card() for machine in machines]
    plan_ = plan(ring_bits, (ELEMENTS,), limits=(0.05,), max_weight=1)
    state = Aggregator(CohortFixed(request=share_request(cards, plan_)))
    name = f"40 MB, {peers} peers, ring of 2^{ring_bits}"
    with tempfile.TemporaryDirectory() as folder:
        paths = {machine.peer: Path(folder) / machine.peer for machine in machines}
        for machine in machines:
            machine.sizes = (ELEMENTS,)
            state.take(machine.peer, machine.answer(state.cohort.request))
        state.apply(state.fix_sharers())
        start = time.thread_time()
        for machine in machines:
            asked = state.request_for(machine.peer)
            assert isinstance(asked, MaskRequest)

            def write(masking: Masking, machine: Machine = machine) -> tuple[str, int]:
                path = paths[machine.peer]
                return masked_file.write(masking, (trained, base), machine.metrics, path)

            state.take(machine.peer, machine.turns.mask(KEY, asked, write))
        spent_s = (time.thread_time() - start) / peers
        print(f"{name}: a peer rounds, masks, hashes and writes: {spent_s:.2f} s")
        plain = len(header_bytes(base.schema)) + 4 * ELEMENTS
        print(f"{name}: {paths[machines[0].peer].stat().st_size / plain:.4f} of the bytes of fp32")
        state.apply(state.fix_survivors())
        for _ in range(2):
            for machine in machines:
                if (asked := state.request_for(machine.peer)) is not None:
                    state.take(machine.peer, machine.answer(asked))
        files = {peer: WeightsFile(path) for peer, path in paths.items()}
        with measured(f"{name}: the coordinator reads, sums and unmasks"):
            mean = masked_file.SecureMean(state.cohort, recover(state), files, base)
            for piece in split_into_pieces(base.schema):
                for part in piece:
                    mean.read(part)
        readers = [WeightsFile(path) for path in paths.values()]
        with measured(f"{name}: the same without masks: read and sum"):
            for piece in split_into_pieces(base.schema):
                for part in piece:
                    total = np.zeros(part.stop - part.start, ring.DTYPES[ring_bits])
                    for reader in readers:
                        place = Part("w", part.start, part.stop)
                        total += reader.read(place).view(total.dtype)
        for file in (*files.values(), *readers):
            file.close()


def recover_sum(peers: int, before: int, after: int) -> None:
    """A whole cohort with lost peers, then the unmasking of 40 MB."""
    start = time.thread_time()
    secure, plain, state = run_cohort(peers, (0, before, 0, after))
    whole_s = time.thread_time() - start
    assert secure.digest == plain.digest
    name = f"{peers} peers, {before} lost before and {after} after their upload"
    print(f"{name}: all sides, tiny model: {whole_s:.2f} s")
    with measured(f"{name}: recover the seeds"):
        recovery = recover(state)
    masks, some = len(recovery.plus) + len(recovery.minus), 64
    part = np.zeros(ELEMENTS, np.uint32)
    start = time.thread_time()
    add_masks(part, (recovery.plus + recovery.minus)[:some], [])
    per_mask_s = (time.thread_time() - start) / min(some, masks)
    print(f"{name}: {masks} masks; 40 MB take {masks * per_mask_s:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="1,000 peers too")
    large = parser.parse_args().large
    random.seed(0)
    for ring_bits in (32, 16):
        mask_a_model(8, ring_bits)
    recover_sum(64, 4, 2)
    if large:
        recover_sum(1000, 70, 30)


if __name__ == "__main__":
    main()
