"""Attacks on the secure aggregation of OpenFL, in an environment that has `openfl`.

Collaborators are OpenFL's, with its callback that exchanges keys and its function that masks, in
this process. The aggregator's side is its `SecAggSetup` and `TensorDB`. The attacker is the
aggregator.

    python -m tests.attacks_others.on_openfl
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from openfl.component.collaborator.collaborator import Collaborator
from openfl.databases import TensorDB
from openfl.interface.aggregation_functions import SecureWeightedAverage
from openfl.protocols.utils import construct_named_tensor
from openfl.utilities import LocalTensor, TensorKey
from openfl.utilities.secagg import calculate_shared_mask, pseudo_random_generator
from openfl.utilities.secagg.bootstrap import SecAggSetup

from tests.attacks_others.measures import (
    CORRELATE,
    STORED,
    SUBTRACT,
    Finding,
    correlation,
    revealed_differences,
    tell,
)

NAMES, VICTIM, AGGREGATOR, ELEMENTS = ("one", "other", "third"), "one", "agg", 1000
#: The steps of SecAggBootstrapping.on_experiment_begin between which it waits for the others.
STEPS = ("keys", "ciphertexts", "shares", "masks")


class TaskRunner:
    """A task runner without tasks."""

    def set_optimizer_treatment(self, treatment: str) -> None:
        pass


class Client:
    """The collaborator's way to the aggregator, without a network."""

    def __init__(self, setup: SecAggSetup, db: TensorDB) -> None:
        self._setup, self._db = setup, db

    def send_local_task_results(
        self, round_number: int, task: str, size: int, tensors: Any
    ) -> None:
        assert self._setup.process_secagg_setup_tensors(tensors)

    def get_aggregated_tensor(
        self, name: str, round_number: int, report: bool, tags: tuple[str, ...], lossless: bool
    ) -> Any:
        key = TensorKey(name, AGGREGATOR, round_number, report, tags)
        value = self._db.get_tensor_from_cache(key)
        assert value is not None, f"the aggregator has no {name} yet"
        return construct_named_tensor(key, json.dumps(value.tolist()).encode(), {}, lossless=True)


class Federation:
    """Collaborators that have exchanged keys, their secrets, and what they send."""

    def __init__(self) -> None:
        self.db = TensorDB()
        client = Client(SecAggSetup(AGGREGATOR, [*NAMES], self.db), self.db)
        collaborators = {
            name: Collaborator(
                name,
                AGGREGATOR,
                "federation",
                client,
                TaskRunner(),
                {},
                callbacks=[],
                secure_aggregation=True,
            )
            for name in NAMES
        }
        bootstrap = {}
        for name, collaborator in collaborators.items():
            (bootstrap[name],) = collaborator.callbacks.callbacks
            bootstrap[name].name, bootstrap[name].client = name, client
        # on_experiment_begin, step by step, because OpenFL's mask generator is a global one.
        for one in bootstrap.values():
            one._generate_keys()
        public = {name: one._fetch_public_keys() for name, one in bootstrap.items()}
        for name, one in bootstrap.items():
            one._generate_ciphertexts(public[name])
        for name, one in bootstrap.items():
            one._decrypt_ciphertexts(public[name])
        self.secret: dict[str, npt.NDArray[np.float32]] = {}
        self.masked: dict[str, npt.NDArray[np.float32]] = {}
        rnd = np.random.default_rng(0)
        for name, one in bootstrap.items():
            one._save_mask_tensors()
            self.secret[name] = rnd.normal(0, 0.05, ELEMENTS).astype(np.float32)
            key = TensorKey("weights", name, 0, False, ("trained",))
            sent = {key: self.secret[name]}
            collaborators[name]._apply_masks(sent)
            on_the_wire = collaborators[name].nparray_to_named_tensor(key, sent[key])
            self.masked[name] = np.frombuffer(on_the_wire.data_bytes, np.float32)

    def stored(self, name: str) -> Any:
        """A value that the aggregator's database holds since the exchange of keys."""
        rows = self.db.tensor_db
        (value,) = rows[(rows["tensor_name"] == name) & (rows["origin"] == "agg")]["nparray"]
        return value

    def check_average(self) -> None:
        """OpenFL's aggregation removes the masks, so they are those of a real run."""
        tensors = [LocalTensor(name, self.masked[name], 1 / len(NAMES)) for name in NAMES]
        rows = self.db.tensor_db.to_dict("records")
        average = SecureWeightedAverage().call(tensors, iter(rows))
        assert np.allclose(average, np.mean([*self.secret.values()], axis=0), atol=1e-5)


def correlate(masked: npt.NDArray[np.float32], secret: npt.NDArray[np.float32]) -> Finding:
    found = correlation(masked, secret)
    return Finding(CORRELATE, found > 0.99, f"correlation {found:.4f}")


def subtract(masked: npt.NDArray[np.float32], secret: npt.NDArray[np.float32]) -> Finding:
    found = revealed_differences(masked, secret)
    return Finding(
        SUBTRACT,
        found > 0.99,
        f"{found:.0%} of the differences are those of the update",
    )


def use_what_is_stored(federation: Federation) -> Finding:
    """The aggregator computes a collaborator's mask from its own database."""
    place = dict(federation.stored("indices"))[VICTIM]
    seed = dict(federation.stored("private_seeds"))[place]
    agreed = [entry for entry in federation.stored("agreed_keys") if entry[0] == place]
    mask = pseudo_random_generator(seed) + calculate_shared_mask(agreed)
    error = np.abs(federation.masked[VICTIM] - mask - federation.secret[VICTIM]).max()
    return Finding(
        STORED,
        bool(error < 1e-5),
        f"the update is recovered with an error of {error:.0e}",
    )


def main() -> None:
    logging.disable(logging.WARNING)
    federation = Federation()
    federation.check_average()
    masked, secret = federation.masked[VICTIM], federation.secret[VICTIM]
    findings = [correlate(masked, secret), subtract(masked, secret), use_what_is_stored(federation)]
    tell("openfl", findings)


if __name__ == "__main__":
    main()
