"""Writes the reference values of tests/protocols/privacy/test_accountant.py, with dp-accounting.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install dp-accounting==0.6.0
    /tmp/reference/bin/python tests/tools/privacy_reference.py

The package needs no part of commonweight, and commonweight does not need the package.
"""

import json
from pathlib import Path

from dp_accounting.pld import privacy_loss_distribution as pld

OUT = Path(__file__).parents[1] / "protocols" / "privacy" / "reference.json"
#: Events by their fields in `protocols.privacy.events`, and δ.
CASES = [
    ([{"type": "Gaussian", "noise": 2.0, "count": 3}], 1e-5),
    ([{"type": "Gaussian", "noise": 40.0, "count": 60}], 1e-6),
    ([{"type": "SampledGaussian", "noise": 1.0, "rate": 0.1, "count": 600}], 1e-5),
    ([{"type": "SampledGaussian", "noise": 1.0, "rate": 0.01, "count": 1000}], 1e-5),
    ([{"type": "SampledGaussian", "noise": 0.6, "rate": 0.01, "count": 100}], 1e-6),
    ([{"type": "SampledGaussian", "noise": 30.0, "rate": 0.5, "count": 1000}], 1e-6),
    ([{"type": "Laplace", "epsilon": 0.1, "count": 30}], 1e-6),
    ([{"type": "Laplace", "epsilon": 1.0, "count": 1}], 1e-6),
    ([{"type": "DiscreteLaplace", "epsilon": 0.1, "count": 30}], 1e-6),
    ([{"type": "DiscreteLaplace", "epsilon": 0.7, "count": 4}], 1e-4),
    (
        [
            {"type": "Gaussian", "noise": 2.0, "count": 3},
            {"type": "Laplace", "epsilon": 0.1, "count": 5},
        ],
        1e-5,
    ),
    (
        [
            {"type": "SampledGaussian", "noise": 1.0, "rate": 0.1, "count": 600},
            {"type": "Laplace", "epsilon": 0.3, "count": 5},
            {"type": "DiscreteLaplace", "epsilon": 0.2, "count": 7},
            {"type": "Gaussian", "noise": 5.0, "count": 10},
        ],
        1e-5,
    ),
    ([{"type": "SharedGaussian", "noise": 5.4, "peers": 14, "row": 0.125, "count": 15}], 1e-5),
    # Gaussian noise of every kind, in one step each.
    (
        [
            {"type": "SharedGaussian", "noise": 9.0, "peers": 3, "count": 40},
            {"type": "Gaussian", "noise": 20.0, "count": 7},
            {"type": "SampledGaussian", "noise": 12.0, "rate": 1.0, "count": 25},
        ],
        1e-6,
    ),
    # The ledger of an owner: runs with shared and own noise, questions by group, a job.
    (
        [
            {"type": "SharedGaussian", "noise": 20.0, "peers": 5, "row": 2.0, "count": 60},
            {"type": "SampledGaussian", "noise": 1.5, "rate": 0.02, "count": 400},
            {"type": "SampledGaussian", "noise": 4.0, "rate": 0.3, "count": 50},
            {"type": "DiscreteLaplace", "epsilon": 0.05, "count": 12},
            {"type": "DiscreteLaplace", "epsilon": 0.2, "count": 3},
            {"type": "Failure", "delta": 1e-7},
            {"type": "Failure", "delta": 4e-7},
        ],
        1e-6,
    ),
    # Rare samples, little noise, and a tiny δ.
    ([{"type": "SampledGaussian", "noise": 0.8, "rate": 0.001, "count": 20000}], 1e-6),
    ([{"type": "SampledGaussian", "noise": 2.0, "rate": 0.1, "count": 100}], 1e-10),
]


def losses(event: dict) -> pld.PrivacyLossDistribution:
    """The privacy loss distribution of an event."""
    match event["type"]:
        case "Gaussian" | "SharedGaussian":  # who adds the noise does not matter
            one = pld.from_gaussian_mechanism(event["noise"])
        case "SampledGaussian":
            one = pld.from_gaussian_mechanism(event["noise"], sampling_prob=event["rate"])
        case "Laplace":
            one = pld.from_laplace_mechanism(1 / event["epsilon"])
        case _:
            one = pld.from_discrete_laplace_mechanism(event["epsilon"])
    return one.self_compose(event["count"])


def main() -> None:
    found = []
    for events, delta in CASES:
        failures = sum(event["delta"] for event in events if event["type"] == "Failure")
        total, *others = [losses(event) for event in events if event["type"] != "Failure"]
        for other in others:
            total = total.compose(other)
        epsilon = total.get_epsilon_for_delta(delta - failures)
        found.append({"events": events, "delta": delta, "epsilon": epsilon})
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
