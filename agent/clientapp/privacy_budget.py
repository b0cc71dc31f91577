"""Charges what leaves this machine to the owner's ledger of privacy, before it leaves.

With a limit (`privacy_max_epsilon`), what has no noise does not leave. No setting of a run changes
that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import msgspec

from agent.home import privacy_ledger
from agent.home.privacy_ledger import Charge, Limit, PrivacyLedger, Purpose
from agent.home.settings_schema import AgentSettings
from agent.tasks.floors import WITHOUT_DATA
from agent.tasks.work import Done
from protocols.errors import NotAllowed, UsageError
from protocols.messages.work import Work
from protocols.model import schema_card
from protocols.privacy import accountant, events, gaussian, private_training
from protocols.privacy.events import Event, Exact, Gaussian, SampledGaussian, SharedGaussian
from protocols.privacy.private_training import PrivateTraining
from protocols.tables.model_scores import ModelScores, is_open

#: The purpose of each answer of a run; other answers disclose nothing about rows.
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

#: The noise is chosen to cost exactly the run's ε, up to the accountant's grid.
_RUN_SLACK = 1.001


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
        """Raise NotAllowed for work whose answer cannot leave: it has no noise and the owner has a
        limit, or its noise would cost more than is left.

        Raises UsageError for a run whose noise is not possible here.
        """
        private = private_training.read(work.settings)
        is_measured = work.kind == "evaluate" or (
            work.kind == "describe" and is_open(work.task, work.settings)
        )
        if not (work.kind == "train" or is_measured) or work.task in WITHOUT_DATA:
            return
        if private is None:
            self._check_exact("evaluation" if is_measured else "training")
            if work.kind == "describe":
                self._check_scores(work)
        elif is_measured:
            raise NotAllowed(f"{_WHAT['evaluation']} have no noise, and this run adds noise")
        else:
            self._check_private(work, private)

    def _check_scores(self, work: Work) -> None:
        """Raise NotAllowed for more cross-validations in a day than the owner allows.

        Each discloses metrics of this machine alone, and the coordinator chooses the settings.
        """
        most = self._settings().model_choices_per_day
        if self._file is not None and self._ledger.scores_of_day(_key_of(work)) >= most:
            raise NotAllowed(
                f"this machine has told the scores of models {most} times in the last 24 hours, "
                "which is its owner's model_choices_per_day",
                "run start with --set model=linear, mlp or trees; or on that machine: "
                f"commonweight-agent policy set model_choices_per_day {max(1, 2 * most)}",
            )

    def _charge_scores(self, work: Work) -> None:
        self._check_exact("evaluation")
        if self._file is not None:
            about = f"{work.task}, scores of models"
            charge = Charge("evaluation", work.run, (Exact(),), self._fleet, about)
            self._ledger.charge_scores(charge, _key_of(work))

    def _check_private(self, work: Work, private: PrivateTraining) -> None:
        chosen = self._settings()
        if chosen.fleet:
            raise UsageError(
                "this agent leads a fleet of its own, whose agents cannot add noise (--dp)"
            )
        if private.is_shared and self.has_limit and chosen.privacy_shared == "off":
            raise NotAllowed(
                "the owner has a privacy budget, which relies on no other machine, and the noise "
                f"of this run relies on {private.shared - 1} others",
                "run start --dp-shared 1; or on that machine: commonweight-agent policy set "
                "privacy.shared on",
            )
        if self._file is None:
            return
        self._ledger.check_complete()
        if not self.has_limit:
            return
        if not self._ledger.events_of("training", work.run):  # before an hour of training
            mu = gaussian.mu_for(private.epsilon, private.delta)
            spent = [event for one in self._ledger.charges() for event in one.noisy]
            privacy_ledger.check(spent, [Gaussian(1 / mu)], Limit.of(chosen))

    def charge(self, work: Work, done: Done) -> None:
        """Charge the result of work. Raises NotAllowed if the owner's limit does not allow it.

        The same update, by its digest, may leave again: it is charged once. Another training of the
        same round has other noise, and is charged again.
        """
        purpose = _PURPOSES.get(work.kind)
        if purpose is None or work.task in WITHOUT_DATA:
            return
        if purpose == "training" and (private := private_training.read(work.settings)) is not None:
            update = f"update {work.run} {done.digest}" if done.digest else None
            self._charge_training(work, private, done.privacy, update)
            return
        if purpose == "survey":
            told = schema_card.decode(done.description)
            if isinstance(told, schema_card.SchemaCard):
                return  # shapes, names and numbers of rows
            if isinstance(told, ModelScores):
                self._charge_scores(work)
                return
        self.charge_exact(purpose, work.run, f"{work.task}, {_WHAT[purpose]}")

    def _charge_training(
        self, work: Work, private: PrivateTraining, told: str, update: str | None
    ) -> None:
        """Charge a round of training by the noise that was added, not by what the run says."""
        added = events.decode(told) if told else ()
        if not added or not all(_is_of(one, private) for one in added):
            raise NotAllowed("the trainer added no noise, so the update stays on its machine")
        if self._file is not None and not self._ledger.has(update):
            of_run = [*self._ledger.events_of("training", work.run), *added]
            most = private.epsilon * _RUN_SLACK
            if total := accountant.epsilon_above(most, of_run, private.delta):
                raise NotAllowed(
                    f"this run may cost ε = {private.epsilon:g} for a row of this peer, and with "
                    f"this round it would be {total:.3g}",
                    "an update that was lost and made again counts twice; start another run with "
                    "--dp",
                )
        self.charge_noisy("training", work.run, added, f"{work.task}, {_WHAT['training']}", update)

    def charge_exact(self, purpose: Purpose, name: str, about: str) -> None:
        """Record that something leaves without noise. Raises NotAllowed if there is a limit."""
        self._check_exact(purpose)
        if self._file is not None and (purpose, name) not in self._known:
            self._ledger.charge_exact(Charge(purpose, name, (Exact(),), self._fleet, about))
            self._known.add((purpose, name))

    def charge_noisy(
        self,
        purpose: Purpose,
        name: str,
        cost: tuple[Event, ...],
        about: str,
        key: str | None = None,
    ) -> None:
        """Record what an answer with noise costs. Raises NotAllowed if the limit is exceeded.

        `key`: as in `PrivacyLedger.charge`.
        """
        if self._file is not None:
            charge = Charge(purpose, name, cost, self._fleet, about)
            self._ledger.charge(charge, Limit.of(self._settings()), key)

    def _check_exact(self, purpose: Purpose) -> None:
        if self.has_limit:
            raise NotAllowed(
                f"the owner has a privacy budget, and {_WHAT[purpose]} would leave without noise",
                "to remove the budget, on that machine: "
                "commonweight-agent policy set privacy.max_epsilon 0",
            )


def _key_of(work: Work) -> str:
    """Equal for requests for the same scores."""
    settings = sorted((name, value) for name, value in work.settings.items())
    return hashlib.sha256(msgspec.json.encode([work.run, work.seed, settings])).hexdigest()


def _is_of(event: Event, private: PrivateTraining) -> bool:
    """True for noise of the kind that the run asks for."""
    if private.is_shared:
        return isinstance(event, SharedGaussian) and event.peers == private.shared
    return isinstance(event, SampledGaussian)
