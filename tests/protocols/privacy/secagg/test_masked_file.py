"""Masked updates as files, and the mean that is read from them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from protocols.errors import BadWeights
from protocols.model.weights import (
    Part,
    Schema,
    Weights,
    file_digest,
    header_bytes,
    split_into_pieces,
)
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import masked_file
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.masks import add_masks
from protocols.privacy.secagg.messages import MaskRequest, Plan, TailNames
from protocols.privacy.secagg.recovery import recover
from protocols.privacy.secagg.turn import Masking
from tests.support.secure_cohort import KEY, Machine, me, plan, share_request


def model(seed: int, scale: float = 1.0) -> Weights:
    """A model with tensors of odd sizes, of two dtypes, one that is not averaged."""
    draw = np.random.default_rng(seed)
    return Weights(
        {
            "a": (scale * draw.normal(size=70_001)).astype(np.float32),
            "b": (scale * draw.normal(size=(3, 5))).astype(np.float16),
            "c": (scale * draw.normal(size=999)).astype(np.float32),
            "steps": np.array([7], np.int64),
        }
    )


def changed(base: Weights, seed: int) -> Weights:
    change = model(seed, 0.01)
    return Weights({n: base[n] + (change[n] if n != "steps" else 0) for n in base})


@pytest.mark.parametrize(("bits", "most"), [(32, 1.02), (16, 0.51)])
def test_a_masked_update_is_as_large_as_its_integers(bits: int, most: float) -> None:
    plain = Weights({"a": np.zeros(200_000, np.float32)})
    whole = TailNames(metrics=("accuracy", "loss"), tallies={"hits": 100})
    masked = masked_file.file_schema(plan(bits, (200_000,), names=whole))
    assert file_bytes(masked) <= most * file_bytes(plain.schema)


def file_bytes(schema: Schema) -> int:
    return len(header_bytes(schema)) + sum(spec.nbytes for spec in schema.values())


@pytest.mark.parametrize("bits", [16, 32])
def test_the_mean_is_that_of_the_updates_by_their_weights(tmp_path: Path, bits: int) -> None:
    base, pins = model(0), Pins(frozenset(me(number).peer for number in range(4)), 2)
    sizes = masked_file.layout(base.schema)
    assert sizes == (70_001, 15, 999)
    machines = {
        (one := Machine(number, pins, random.Random(number), sizes)).peer: one
        for number in range(4)
    }
    trained = {peer: changed(base, seed) for seed, peer in enumerate(machines, 1)}
    of = plan(bits, sizes, limits=(0.06,) * 3)
    state = Aggregator(
        CohortFixed(request=share_request([m.card() for m in machines.values()], of))
    )
    for peer, machine in machines.items():
        state.take(peer, machine.answer(state.cohort.request))
    state.apply(state.fix_sharers())
    lost, *alive = sorted(machines)
    for peer in alive:
        asked = state.request_for(peer)

        def write(masking: Masking, peer: str = peer) -> tuple[str, int]:
            machine = machines[peer]
            return masked_file.write(
                masking, (trained[peer], base), machine.metrics, tmp_path / f"{peer}.safetensors"
            )

        answer = machines[peer].turns.mask(KEY, asked, write)  # type: ignore[arg-type]
        assert answer.nbytes == (tmp_path / f"{peer}.safetensors").stat().st_size
        again = machines[peer].turns.mask(KEY, asked, write)  # type: ignore[arg-type]
        assert again == answer
        state.take(peer, answer)
    assert lost not in state.uploads
    state.apply(state.fix_survivors())
    for _ in range(2):
        for peer in alive:
            if (asked := state.request_for(peer)) is not None:
                state.take(peer, machines[peer].answer(asked))

    files = {peer: WeightsFile(tmp_path / f"{peer}.safetensors") for peer in alive}
    for file in files.values():
        masked_file.check_file(file, of)
    mean = masked_file.SecureMean(state.cohort, recover(state), files, base)
    total = sum(state.cohort.weights[peer] for peer in alive)
    for name in base:
        whole = mean.read(Part(name, 0, base[name].size))
        by_parts = [
            mean.read(part)
            for piece in split_into_pieces(base.schema, 1000)
            for part in piece
            if part.name == name
        ]
        assert (np.concatenate(by_parts) == whole).all()
        expected = (
            base[name].astype(np.float64)
            + sum(
                state.cohort.weights[peer] * (trained[peer][name].astype(np.float64) - base[name])
                for peer in alive
            )
            / total
        )
        step = 0.06 / (2 ** (state.cohort.bits - 1) - 1)
        rounding = 0.002 if base[name].dtype == np.float16 else 1e-6
        assert np.abs(whole - expected.reshape(-1)).max() <= step + rounding
    sums = np.sum([machines[peer].metrics for peer in alive], axis=0)
    assert np.allclose(mean.metrics(), sums, atol=1e-4)


def test_a_file_of_another_cohort_is_refused(tmp_path: Path) -> None:
    base = model(0)
    with pytest.raises(BadWeights, match="'t' is missing"):
        masked_file.check_file(base, plan(16, (70_001, 15, 999)))


def masking_of(of: Plan) -> Masking:
    """How the first peer of a cohort of three masks under this plan."""
    pins, key = Pins(frozenset(me(number).peer for number in range(3))), KEY._replace(kind=of.kind)
    machines = [Machine(number, pins, random.Random(number), of.sizes) for number in range(3)]
    cards = [machine.card(key) for machine in machines]
    state = Aggregator(CohortFixed(request=share_request(cards, of)))
    for machine in machines:
        state.take(machine.peer, machine.answer(state.cohort.request, key))
    state.apply(state.fix_sharers())
    maskings: list[Masking] = []

    def keep(masking: Masking) -> tuple[str, int]:
        maskings.append(masking)
        return "ab" * 32, 1

    request = state.request_for(machines[0].peer)
    assert isinstance(request, MaskRequest)
    machines[0].turns.mask(key, request, keep)
    return maskings[0]


def test_a_change_above_the_limit_of_the_norm_is_scaled_down_to_it(tmp_path: Path) -> None:
    base, sizes, clip = model(0), (70_001, 15, 999), 1.0
    masking = masking_of(plan(32, sizes, limits=(1.0,) * 3, clip=clip))
    step = 1.0 / (2 ** (masking.cohort.bits - 1) - 1)
    for seed, factor in ((2, 0.01), (3, 5.0)):
        change = model(seed, factor)
        trained = Weights({n: base[n] + (change[n] if n != "steps" else 0) for n in base})
        norm = sum(
            np.square(trained[n].astype(np.float64) - base[n]).sum() for n in base if n != "steps"
        )
        path = tmp_path / str(seed)
        masked_file.write(masking, (trained, base), [0.0, 1.0], path)
        with WeightsFile(path) as file:
            sent = file.read(Part("w", 0, sum(sizes))).view("<u4").copy()
        add_masks(sent, masking.minus, masking.plus)
        sent_norm = np.linalg.norm(sent.view("<i4") * step / masking.weight)
        assert sent_norm == pytest.approx(min(np.sqrt(norm), clip), rel=1e-2)


#: By ring, and by what is scaled down: the digests of files that version 0.1 wrote.
SAME_BYTES = {
    (32, "nothing"): "3111f360544d7cfa973be6680fd5fbb557c85a26bf5d1da92441da3af6f03bc4",
    (32, "elements"): "3fe68017fa55c5b51ab5e385f404f72c6ab559862c543ca94170eb3cb3f3ef37",
    (32, "all"): "03cd46d825f1a005e01561adeba6e5e2089646bd921d12c1d0e398281f677c5b",
    (32, "the last tensor"): "4c2a604e022c574ed6432044fa421ec3a632a1ddc29ed3114635343b06d4e394",
    (16, "nothing"): "5ccc370e37b9c46a1c7b2b628e0dfbf312100c784953898ee9872caeec0bca24",
    (16, "elements"): "e38d55561443e90633999a872742b3a8f35ca4294c9be21a636b28d7c4e4affd",
    (16, "all"): "0e19e8215553980adaa5eb35649c2f600f78c9af6f639ed5c3acb637a0e95677",
    (16, "the last tensor"): "53c99489c1957bd0ff931761f5c5745f09b7aab1722724e2356a69cba1cd9b76",
}


@pytest.mark.parametrize(("bits", "scaled"), SAME_BYTES)
def test_the_same_weights_give_the_same_bytes_in_every_version(
    tmp_path: Path, bits: int, scaled: str
) -> None:
    base, sizes = model(0), (70_001, 15, 999)
    limits = {"elements": (0.03,) * 3, "the last tensor": (1.0, 1.0, 0.001)}
    masking = masking_of(
        plan(
            bits,
            sizes,
            limits=limits.get(scaled, (1.0,) * 3),
            clip=1.0 if scaled == "all" else 1e30,
        )
    )
    change = model(2, 5.0 if scaled == "all" else 0.01)
    trained = Weights({n: base[n] + (change[n] if n != "steps" else 0) for n in base})
    path = tmp_path / "file"
    digest, _ = masked_file.write(masking, (trained, base), [0.0, 1.0], path)
    assert digest == SAME_BYTES[bits, scaled] == file_digest(path)
    assert list(tmp_path.iterdir()) == [path], "nothing is left of a first attempt"


def test_an_evaluation_is_a_file_with_metrics_alone(tmp_path: Path) -> None:
    masking = masking_of(plan(32, (), limits=(), kind="evaluate"))
    digest, nbytes = masked_file.write(masking, None, [3.0, 2.0], tmp_path / "file")
    with WeightsFile(tmp_path / "file") as file:
        masked_file.check_file(file, masking.cohort.plan)
        assert file.schema["w"].shape == (0,)
    assert file_digest(tmp_path / "file") == digest
    assert (tmp_path / "file").stat().st_size == nbytes
