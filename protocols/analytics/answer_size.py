"""The most bytes of an answer, by its question. Pure."""

from __future__ import annotations

from msgspec import UNSET

from protocols.analytics.model_states import upper_size
from protocols.analytics.models import MAX_EDGES
from protocols.analytics.query import Query

#: No answer is longer, whatever was asked.
MAX_ANSWER_BYTES = 2 << 20
#: The most groups in an answer, and bytes for the names of a group and its row count.
_MAX_GROUPS, _GROUP_BYTES = 2000, 2048
_HEAD_BYTES = 64 << 10
#: Bytes of the longest figure; a histogram has this many for each bin.
_FIGURE_BYTES, _BIN_BYTES, _QUANTILES_BYTES = 512, 24, 256 << 10
#: Bytes of all names of columns, of all categories of one, and of a number of a model.
_COLUMNS_BYTES, _LEVELS_BYTES, _SUM_BYTES = 1 << 20, 128 << 10, 32


def max_answer_bytes(question: Query) -> int:
    """The most bytes of an honest answer; never more than `MAX_ANSWER_BYTES`."""
    cell = _GROUP_BYTES
    for operation in question.operations:
        cell += _FIGURE_BYTES
        if operation.kind == "histogram" and len(operation.args) == 3:
            cell += _BIN_BYTES * int(operation.args[0])
        elif operation.kind in ("quantile", "histogram"):
            cell += _QUANTILES_BYTES
        elif operation.kind == "columns":
            cell += _COLUMNS_BYTES
        elif operation.kind == "levels":
            cell += _LEVELS_BYTES
        elif operation.kind == "survival":
            cell += 3 * _BIN_BYTES * (MAX_EDGES + 1)
        elif operation.model is not UNSET:
            width, bins = len(operation.model.at), len(operation.model.edges) + 1
            cell += _SUM_BYTES * (4 + 2 * bins * (2 + width + upper_size(width)))
    cells = _MAX_GROUPS if question.by else 1
    return min(_HEAD_BYTES + cells * cell, MAX_ANSWER_BYTES)
