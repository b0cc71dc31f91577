"""The noise of answers to questions and jobs has the size that is charged."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from agent.analytics import differential_privacy
from agent.clientapp.told_scores import blur, blur_cost
from agent.tasks.work import Done
from protocols.privacy.events import DiscreteLaplace

DRAWS = 1500


def check(noise: np.ndarray, epsilon: float) -> None:
    """Mean and variance are those of discrete Laplace noise, within 4 standard deviations."""
    ratio = math.exp(-epsilon)
    claim = 2 * ratio / (1 - ratio) ** 2
    assert abs(noise.mean()) < 4 * math.sqrt(claim / len(noise))
    # The fourth moment of Laplace noise is 6 times the squared variance.
    assert abs(noise.var() / claim - 1) < 4 * math.sqrt(5 / len(noise))


@pytest.mark.parametrize(("kind", "epsilon"), [(int, 0.2), (float, 0.05)])
def test_noise_of_a_question(kind: type, epsilon: float) -> None:
    pytest.importorskip("opendp", reason="noise is in the extra analyze")
    drawn = [differential_privacy._noisy(kind(1000), epsilon) - 1000 for _ in range(DRAWS)]
    check(np.array(drawn, np.float64), epsilon)


def test_noise_of_a_job() -> None:
    chance, done = random.Random(3), Done(num_examples=2000, metrics={"accuracy": 0.5})
    scores = [blur(done, 5, lambda *told: chance) for _ in range(DRAWS)]
    drawn = [2000 * (score.metrics["accuracy"] or 0.0) - 1000 for score in scores]
    (charged,) = blur_cost(5)
    assert isinstance(charged, DiscreteLaplace)
    check(np.array(drawn), charged.epsilon)
