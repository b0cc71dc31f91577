"""Weights as Flower's records, and the Grid that sends a digest in place of the arrays.

The claim check of the weight lane is hidden here: a strategy hands ordinary ArrayRecords to the
Grid; on the wire a message carries a ConfigRecord with the digest, the bytes travel on the lane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import InProcessGrid, Superlink
from protocols.errors import BadMessage, CommonweightError
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import schema_card
from protocols.model.schema_card import Description
from protocols.model.weights import Part, Weights

WEIGHTS = "cw.weights"
CLAIM, DESCRIPTION, PROOF = "cw.claim", "cw.description", "cw.proof"


class InMemoryArray(Array):
    """An Array of this process: the numpy array as it is, and bytes of it only if asked.

    Flower's own writes each array out and reads it again whenever a strategy looks at it.
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
    """A record of HeldArrays.

    Flower's own, asked for its arrays one last time, writes each of them out to count its bytes and
    then collects garbage through the whole process: a tenth of a second for every update.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__()
        for name, array in arrays.items():  # one by one: its constructor makes plain Arrays of them
            self[name] = InMemoryArray(np.asarray(array))

    def copy(self) -> InMemoryRecord:
        return InMemoryRecord({name: array.numpy() for name, array in self.items()})

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[npt.NDArray[Any]]:
        found = [array.numpy() for array in self.values()]
        if not keep_input:
            self.clear()
        return found


class VersionRecord(InMemoryRecord):
    """A version that the lane already holds, named by its digest.

    It holds arrays only if it is given the model: FedAvg passes the record on without a look.
    """

    def __init__(self, digest: str, model: Weights | None = None) -> None:
        super().__init__({name: np.asarray(array) for name, array in (model or {}).items()})
        self.__dict__["digest"] = digest

    @property
    def digest(self) -> str:
        digest: str = self.__dict__["digest"]
        return digest


def part_key(part: Part) -> str:
    """A name for a part of a tensor: a Flower record knows only whole arrays."""
    return f"{part.name}[{part.start}:{part.stop}]"


def as_weights(record: ArrayRecord) -> Weights:
    """All of a record's arrays."""
    return Weights({name: array.numpy() for name, array in record.items()})


def shared_config(messages: Sequence[Message]) -> dict[str, int | float]:
    """The numbers that a strategy put into its messages' config, named as settings are.

    Raises CommonweightError if they are not the same for all: a round has one piece of work.
    """
    found = [_numbers(message) for message in messages]
    if any(numbers != found[0] for numbers in found):
        raise CommonweightError(
            "the strategy wants to tell peers different things in one round",
            "a round's work is the same for all; --set gives settings to the task",
        )
    return found[0]


def _numbers(message: Message) -> dict[str, int | float]:
    return {
        name.replace("-", "_"): value
        for config in message.content.config_records.values()
        for name, value in config.items()
        if isinstance(value, int | float) and name != "server-round"
    }


def weights_record(digest: str, nbytes: int) -> ConfigRecord:
    """What stands in a message where the arrays were."""
    return ConfigRecord({"digest": digest, "nbytes": nbytes})


def read_claim(reply: Message) -> tuple[UpdateClaim, bytes, bytes]:
    """The claim in a reply, its bytes and the signature. Raises BadMessage, KeyError, TypeError."""
    record = cast(ConfigRecord, reply.content[CLAIM])
    payload, signature = record["claim"], record["signature"]
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        raise TypeError("a claim and its signature are bytes")
    return SIGNED_CLAIM.decode(payload), payload, signature


def read_description(reply: Message, claim: UpdateClaim) -> Description:
    """The description that a claim is for. Raises BadMessage, KeyError, TypeError."""
    told = cast(ConfigRecord, reply.content[DESCRIPTION])["description"]
    if not isinstance(told, bytes):
        raise TypeError("a description is bytes")
    if (len(told), hashlib.sha256(told).hexdigest()) != (claim.nbytes, claim.digest):
        raise BadMessage("the description is not the one that was signed")
    return schema_card.decode(told)


def read_proof(reply: Message) -> tuple[bytes, bytes] | None:
    """The signed work that proves which version a peer holds. Raises TypeError, KeyError."""
    if PROOF not in reply.content:
        return None
    record = cast(ConfigRecord, reply.content[PROOF])
    work, signature = record["work"], record["signature"]
    if not isinstance(work, bytes) or not isinstance(signature, bytes):
        raise TypeError("signed work and its signature are bytes")
    return work, signature


class ClaimCheckGrid(InProcessGrid):
    """A Grid whose arrays travel on the lane.

    `push_messages` commits the arrays it meets to the lane (a VersionRecord is there already) and
    sends their digest. Replies are given as they came, with the agent's claim: the gate decides
    what becomes of them.
    """

    def __init__(self, superlink: Superlink, store: WeightStore) -> None:
        super().__init__(superlink)
        self._weights = store

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent: dict[int, RecordDict] = {}
        slim: list[Message] = []
        for message in messages:
            content = message.content
            if id(content) not in sent:
                sent[id(content)] = self._claim_check(content)
            message.content = sent[id(content)]
            slim.append(message)
        return super().push_messages(slim)

    def _claim_check(self, content: RecordDict) -> RecordDict:
        slim = RecordDict()
        for name, record in content.items():
            if not isinstance(record, ArrayRecord):
                slim[name] = record
                continue
            digest = record.digest if isinstance(record, VersionRecord) else ""
            if not digest:
                digest = self._weights.save(as_weights(record))
            slim[WEIGHTS] = weights_record(
                digest, self._weights.version_path(digest).stat().st_size
            )
        return slim
