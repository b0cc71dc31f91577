"""How much the predictions of each model count in a blend. Pure.

Stacking with weights that are not negative and have the sum 1 (Breiman, Stacked regressions, 1996;
van der Laan et al., Super learner, 2007). They are pulled to equal ones, as if one more row for
each model asked for them.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_PULL_ROWS = 1.0
_STEPS = 200
#: The least probability of a class.
_LEAST = 1e-12


def of_numbers(predicted: Floats, truth: Floats) -> Floats:
    """The weights float64[k] with the least squared error of predictions float64[k, n] of numbers
    float64[n]. Exact: of all sets of models, the best one whose weights are not negative."""
    count, rows = predicted.shape
    equal = np.full(count, 1 / count)
    noise = float(np.mean((equal @ predicted - truth) ** 2))
    pull = _PULL_ROWS * count * noise / rows
    gram = predicted @ predicted.T / rows + pull * np.eye(count)
    aim = predicted @ truth / rows + pull * equal

    def loss(weights: Floats) -> float:
        return float(weights @ gram @ weights - 2 * aim @ weights)

    best = equal
    for size in range(1, count + 1):
        for some in map(list, combinations(range(count), size)):
            # The least loss with the sum 1, by a Lagrange multiplier.
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = 2 * gram[np.ix_(some, some)]
            system[:size, size] = system[size, :size] = 1
            goal = np.append(2 * aim[some], 1.0)
            found = np.linalg.lstsq(system, goal, rcond=None)[0][:size]
            if (found < 0).any():
                continue
            weights = np.zeros(count)
            weights[some] = found / found.sum()
            best = min(best, weights, key=loss)
    return best


def of_classes(chances: Floats, counted: Floats | None = None) -> Floats:
    """The weights float64[k] with the highest likelihood, from the probability float64[k, n] that
    each model gives the true class of a row: that of a mixture, by expectation maximization
    (Dempster et al. 1977). `counted` float64[n]: how much each row counts."""
    count, rows = chances.shape
    counted = np.ones(rows) if counted is None else counted
    weights = np.full(count, 1 / count)
    chances = np.maximum(chances, _LEAST)
    for _ in range(_STEPS):
        shares = weights[:, None] * chances
        found = (shares / shares.sum(0)) @ counted + _PULL_ROWS
        weights = found / found.sum()
    return weights
