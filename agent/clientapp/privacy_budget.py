"""Charges what leaves this machine to the owner's ledger of privacy, before it leaves.

With a limit (`privacy_max_epsilon`), what has no noise does not leave. No setting of a run changes
that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger, Purpose
from agent.home.settings_schema import AgentSettings
from agent.tasks.floors import WITHOUT_DATA
from agent.tasks.work import Done
from protocols.errors import NotAllowed
from protocols.messages.work import Work
from protocols.model import schema_card
from protocols.privacy.events import Event, Exact

#: What an answer of a run is for; others tell nothing of rows.
_PURPOSES: dict[str, Purpose] = {
    "describe": "survey",
    "train": "training",
    "evaluate": "evaluation",
}
_WHAT = {
    "survey": "the statistics of its table",
    "training": "its updates",
    "evaluation": "its metrics",
    "job": "its metrics",
}


class PrivacyBudget:
    """The ledger in `file` (None: nothing is recorded), and the owner's limit now."""

    def __init__(
        self,
        file: Path | None = None,
        settings: Callable[[], AgentSettings] = AgentSettings,
        fleet: str = "",
    ) -> None:
        self._file, self._settings, self._fleet = file, settings, fleet
        #: Purposes and names that are in the ledger as exact.
        self._known: set[tuple[Purpose, str]] = set()

    @cached_property
    def _ledger(self) -> PrivacyLedger:
        assert self._file is not None
        return PrivacyLedger(self._file)

    @property
    def has_limit(self) -> bool:
        return self._settings().privacy_max_epsilon > 0

    def check(self, work: Work) -> None:
        """Raise NotAllowed for work whose answer has no noise, if the owner has a limit."""
        if work.kind in ("train", "evaluate") and work.task not in WITHOUT_DATA:
            self._check_exact(_PURPOSES[work.kind])

    def charge(self, work: Work, done: Done) -> None:
        """Charge the result of work. Raises NotAllowed if the owner's limit does not allow it."""
        purpose = _PURPOSES.get(work.kind)
        if purpose is None or work.task in WITHOUT_DATA:
            return
        if purpose == "survey":
            told = schema_card.decode(done.description)
            if isinstance(told, schema_card.SchemaCard):
                return  # shapes, names and numbers of rows
        self.charge_exact(purpose, work.run, f"{work.task}, {_WHAT[purpose]}")

    def charge_exact(self, purpose: Purpose, name: str, about: str) -> None:
        """Record that something leaves without noise. Raises NotAllowed if there is a limit."""
        self._check_exact(purpose)
        if self._file is not None and (purpose, name) not in self._known:
            self._ledger.charge_exact(Charge(purpose, name, (Exact(),), self._fleet, about))
            self._known.add((purpose, name))

    def charge_noisy(
        self, purpose: Purpose, name: str, events: tuple[Event, ...], about: str
    ) -> None:
        """Record what an answer with noise costs. Raises NotAllowed if the limit is exceeded."""
        if self._file is not None:
            charge = Charge(purpose, name, events, self._fleet, about)
            self._ledger.charge(charge, Limit.of(self._settings()))

    def _check_exact(self, purpose: Purpose) -> None:
        if self.has_limit:
            raise NotAllowed(
                f"the owner has a privacy budget, and {_WHAT[purpose]} would leave without noise",
                "on that machine: commonweight-agent policy set privacy.max_epsilon 0, for none",
            )
