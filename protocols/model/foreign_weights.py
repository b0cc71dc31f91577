"""Weights of other programs: safetensors files whose header is not canonical."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from protocols.errors import BadWeights
from protocols.model.weights import Weights, parse_header, view


def load(path: Path) -> Weights:
    """Weights in any safetensors file, canonical or not, through a read-only memory map.

    Raises BadWeights, also for an unsupported dtype, and OSError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks header, offsets and size
            pass
    except SafetensorError as err:
        raise BadWeights(f"not a safetensors file: {err}") from err
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offset = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:offset])
    table.pop("__metadata__", None)
    schema = parse_header(table)
    offsets = {name: offset + table[name]["data_offsets"][0] for name in schema}
    return view(data, schema, offsets)
