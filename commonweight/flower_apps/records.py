"""Flower's records as small bytes and a file of weights, and back. Only Flower's public names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from protocols.errors import BadMessage
from protocols.messages import app_work
from protocols.messages.app_work import Arrays, Blob, Opaque, Values
from protocols.model import weights
from protocols.model.weights import DTYPES, Weights

_NUMPY = "numpy.ndarray"
_PLAIN = frozenset(dtype for code, dtype in DTYPES.items() if code != "BF16")


class Packed(NamedTuple):
    """The records of a message; and digest and size of the file, empty and 0 without arrays."""

    told: bytes
    digest: str = ""
    nbytes: int = 0


def pack(content: RecordDict, file: Path) -> Packed:
    """Write the arrays of a message to `file`, if it has any. Raises BadMessage if the message is
    larger than one may be, OSError."""
    told: list[Arrays | Values] = []
    arrays: dict[int, dict[str, Any]] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            opaque: dict[str, Opaque] = {}
            arrays[len(told)] = {key: _plain(key, one, opaque) for key, one in record.items()}
            told.append(Arrays(name, tuple(record), opaque))
        else:
            values = {key: _sent(value) for key, value in record.items()}
            told.append(Values(name, isinstance(record, MetricRecord), values))
    data = app_work.encode_told(told)
    if len(data) > app_work.MAX_RECORD_BYTES:
        raise BadMessage(
            f"the configs and metrics of a message have {len(data):,} bytes, at most "
            f"{app_work.MAX_RECORD_BYTES:,} are sent",
            "put large values into an ArrayRecord",
        )
    records = app_work.decode_records(data)  # raises BadMessage where the other side would
    if not app_work.has_arrays(records):
        return Packed(data)
    tensors = {
        app_work.tensor_name(records, record, key): array
        for number, record in enumerate(records)
        if isinstance(record, Arrays)
        for key, array in arrays[number].items()
    }
    digest = weights.save(Weights(tensors), file, synced=False)
    return Packed(data, digest, file.stat().st_size)


def _plain(key: str, array: Array, opaque: dict[str, Opaque]) -> Any:
    """The array as numpy has it; or else its bytes, which are noted in `opaque`."""
    if array.stype == _NUMPY:
        found = array.numpy()
        if found.dtype.newbyteorder("<") in _PLAIN:
            return found
    opaque[key] = Opaque(array.dtype, tuple(array.shape), array.stype)
    return np.frombuffer(array.data, np.uint8)


def _sent(value: Any) -> Any:
    """A value of a record as it travels."""
    if isinstance(value, list):
        return [_sent(one) for one in value]
    return Blob(value) if isinstance(value, bytes) else value


def _received(value: Any) -> Any:
    """The value that `_sent` was given."""
    if isinstance(value, list):
        return [_received(one) for one in value]
    return value.data if isinstance(value, Blob) else value


def unpack(told: bytes, file: Path | None) -> RecordDict:
    """The records of a message. Raises BadMessage, BadWeights, OSError, and what Flower raises for
    values that a record cannot have."""
    records = app_work.decode_records(told)
    model = weights.load(file) if file is not None else Weights({})
    names = {
        app_work.tensor_name(records, record, key)
        for record in records
        if isinstance(record, Arrays)
        for key in record.keys
    }
    if names != set(model):
        raise BadMessage("the records of a message and its file have other arrays")
    content = RecordDict()
    for record in records:
        if isinstance(record, Values):
            kind = MetricRecord if record.is_metrics else ConfigRecord
            content[record.name] = kind(
                {key: _received(value) for key, value in record.values.items()}
            )
            continue
        arrays = ArrayRecord()
        for key in record.keys:
            found = np.array(model[app_work.tensor_name(records, record, key)])
            if (form := record.opaque.get(key)) is None:
                arrays[key] = Array(found)
            else:
                arrays[key] = Array(form.dtype, form.shape, form.stype, found.tobytes())
        content[record.name] = arrays
    return content
