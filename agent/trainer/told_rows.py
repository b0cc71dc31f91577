"""Records the rows of the owner that an answer depends on, before the answer leaves the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from agent.data import helper_requests
from agent.data.disclosed_sets import DisclosedSets, Numbers, ToldSet, Use
from agent.data.settings import DataSettings
from agent.tasks import Settings, Task
from agent.tasks.capabilities import KnowsRows, WatchesEpochs


class ToldRows:
    """The rows that the present data were used for. Rows that were recorded already cost no
    look-up.

    Without data, or without a memory, nothing is recorded.
    """

    def __init__(self, data: DataSettings = DataSettings()) -> None:
        self._data = data
        self._told: dict[Use, Numbers] = {}

    def tell(self, task: Task, use: Use, settings: Settings) -> None:
        """Record the rows of a use. Raises NotAllowed if they differ from earlier ones in too few
        rows."""
        if self._data.memory and isinstance(task, KnowsRows):
            rows = task.rows_of(use, settings)
            if rows is not None and self._told.get(use) is not rows:
                self._record(use, rows)
                self._told[use] = rows

    def tell_training(self, task: Task, settings: Settings, *, whole: bool) -> None:
        """The same for the training that follows, at the latest before each epoch: one that ends
        early uses a part of the rows. `whole`: an answer depends on all of them in any case."""
        if not self._data.memory or not isinstance(task, KnowsRows):
            return
        if whole or not isinstance(task, WatchesEpochs):
            self.tell(task, "train", settings)
        if not isinstance(task, WatchesEpochs):
            return
        task.watch_epochs(lambda places: self.tell_part(task, settings, places))

    def tell_part(self, task: Task, settings: Settings, places: npt.NDArray[np.int64]) -> None:
        """Record the rows for training at these places, which may be all or a part of them. Raises
        NotAllowed as `tell` does."""
        if not self._data.memory or not isinstance(task, KnowsRows):
            return
        rows = task.rows_of("train", settings)
        if rows is not None and len(places) < len(rows):
            self._record("steps", rows[places])
        else:
            self.tell(task, "train", settings)

    def _record(self, use: Use, rows: Numbers) -> None:
        memory = helper_requests.stores() or DisclosedSets(Path(self._data.memory))
        try:
            memory.tell([ToldSet(use, np.sort(rows))], self._data.min_count)
        finally:
            memory.close()
