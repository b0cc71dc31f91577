"""Weights and claims as Flower records.

A strategy gets ordinary ArrayRecords. Messages have none: signed work and claims name weights by
their digests, and HTTP transfers them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from protocols.errors import BadMessage, CommonweightError
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import schema_card
from protocols.model.schema_card import DescribeAnswer
from protocols.model.weights import Part

CLAIM, DESCRIPTION, PROOF = "cw.claim", "cw.description", "cw.proof"
#: The request of a step of secure aggregation.
REQUEST = "cw.request"


class InMemoryArray(Array):
    """An Array that holds a numpy array, and serializes it only on demand.

    Flower's own Array serializes each array, and parses it whenever a strategy reads it.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.__dict__["held"] = array
        super().__init__(str(array.dtype), array.shape, "numpy.ndarray", b"")

    def numpy(self) -> npt.NDArray[Any]:
        return cast("npt.NDArray[Any]", self.__dict__["held"])

    @property
    def data(self) -> bytes:
        return Array(self.numpy()).data

    @data.setter
    def data(self, _: bytes) -> None:
        """Flower's constructor sets it."""


class InMemoryRecord(ArrayRecord):
    """A record of InMemoryArrays.

    Flower's own record serializes its arrays to count their bytes when they are read with
    `keep_input=False`, and then collects garbage in the whole process: 0.1 s for each update.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__()
        for name, array in arrays.items():  # the constructor would make plain Arrays
            self[name] = InMemoryArray(np.asarray(array))

    def copy(self) -> InMemoryRecord:
        return InMemoryRecord({name: array.numpy() for name, array in self.items()})

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[npt.NDArray[Any]]:
        arrays = [array.numpy() for array in self.values()]
        if not keep_input:
            self.clear()
        return arrays


def part_key(part: Part) -> str:
    """A name for a part of a tensor: a Flower record has only whole arrays."""
    return f"{part.name}[{part.start}:{part.stop}]"


def shared_config(messages: Sequence[Message]) -> dict[str, int | float]:
    """The numbers in the config of a strategy's messages, named like settings.

    Raises CommonweightError if they differ: all peers do the same work in a round.
    """
    configs = [_numbers(message) for message in messages]
    if any(config != configs[0] for config in configs):
        raise CommonweightError(
            "the strategy sends different settings to the peers of one round",
            "send the same to all; --set gives settings to the task",
        )
    return configs[0]


def _numbers(message: Message) -> dict[str, int | float]:
    return {
        name.replace("-", "_"): value
        for config in message.content.config_records.values()
        for name, value in config.items()
        if isinstance(value, int | float) and name != "server-round"
    }


def read_claim(reply: Message) -> tuple[UpdateClaim, bytes, bytes]:
    """The claim in a reply, its bytes and the signature. Raises BadMessage, KeyError, TypeError."""
    payload, signature = _bytes(reply, CLAIM, "claim"), _bytes(reply, CLAIM, "signature")
    return SIGNED_CLAIM.decode(payload), payload, signature


def read_description(reply: Message, claim: UpdateClaim) -> DescribeAnswer:
    """The description that a claim is for. Raises BadMessage, KeyError, TypeError."""
    return schema_card.decode(read_answer(reply, claim))


def read_answer(reply: Message, claim: UpdateClaim) -> bytes:
    """The bytes that a claim is for. Raises BadMessage, KeyError, TypeError."""
    description = _bytes(reply, DESCRIPTION, "description")
    if (len(description), hashlib.sha256(description).hexdigest()) != (claim.nbytes, claim.digest):
        raise BadMessage("the description is not the one that was signed")
    return description


def read_proof(reply: Message) -> tuple[bytes, bytes] | None:
    """The signed work that proves which version a peer has. Raises TypeError, KeyError."""
    if PROOF not in reply.content:
        return None
    return _bytes(reply, PROOF, "work"), _bytes(reply, PROOF, "signature")


def _bytes(reply: Message, record: str, key: str) -> bytes:
    value = cast(ConfigRecord, reply.content[record])[key]
    if not isinstance(value, bytes):
        raise TypeError(f"{key} in {record} must be bytes")
    return value
