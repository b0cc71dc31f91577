"""The most bytes of an answer, by its question. Pure."""

from __future__ import annotations

from protocols.analytics.query import Query

#: No answer is longer, whatever was asked.
MAX_ANSWER_BYTES = 2 << 20
#: The most groups in an answer, and bytes for the names of a group and its row count.
_MAX_GROUPS, _GROUP_BYTES = 2000, 2048
_HEAD_BYTES = 64 << 10
#: Bytes of the longest figure; a histogram has so many for each bin.
_FIGURE_BYTES, _BIN_BYTES, _QUANTILES_BYTES = 512, 24, 256 << 10


def max_answer_bytes(question: Query) -> int:
    """What an honest answer can need at most, and never more than `MAX_ANSWER_BYTES`."""
    cell = _GROUP_BYTES
    for operation in question.operations:
        cell += _FIGURE_BYTES
        if operation.kind == "histogram" and len(operation.args) == 3:
            cell += _BIN_BYTES * int(operation.args[0])
        elif operation.kind in ("quantile", "histogram"):
            cell += _QUANTILES_BYTES
    cells = _MAX_GROUPS if question.by else 1
    return min(_HEAD_BYTES + cells * cell, MAX_ANSWER_BYTES)
