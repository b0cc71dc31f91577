"""Filters for the log of a simulation, in which many peers write the same lines."""

from __future__ import annotations

import logging
import re

from coordinator.runs.steps import LEFT


def is_unexpected(record: logging.LogRecord) -> bool:
    """False for a peer that drops out, which the simulation causes."""
    return not record.getMessage().endswith(LEFT)


class NewRefusals(logging.Filter):
    """Drops a refusal that equals an earlier one; `run show` has them all."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.fullmatch(r"refused \S+: (.*)", record.getMessage(), re.DOTALL)
        is_new = found is None or found[1] not in self._seen
        self._seen.update([found[1]] if found else [])
        return is_new
