"""Requests the details that only operators get, while a page shows them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from coordinator.api.schema import EvaluationsResponse
from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Fleet, Job
from coordinator.jobs.messages import JobShare
from coordinator.monitor.evaluations import Evaluations
from coordinator.monitor.job_shares import Shares, job_key
from coordinator.remote.source import Source
from protocols.errors import CommonweightError, Refused

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote

T = TypeVar("T")
Request = Coroutine[Any, Any, None]
#: Between two requests, however often there is something new.
MIN_INTERVAL_S = 3.0


class _Reader(Generic[T]):
    """Asks once for each key. An observer is refused, and nothing is asked again.

    `answer` is for `name`, such as a run; None without one. `error`: why there is none.
    """

    def __init__(self, source: Source) -> None:
        self.name, self.error = "", ""
        self.answer: T | None = None
        self._source = source
        self._key: tuple[object, ...] = ()
        self._next_at = 0.0
        self._is_asking = self._is_refused = False

    def request(
        self, name: str, key: tuple[object, ...], ask: Callable[[Remote], T], now: float
    ) -> list[Request]:
        """A request that is due, as there is something new about `name`: `key` has changed."""
        is_early = name == self.name and now < self._next_at
        if self._is_asking or self._is_refused or is_early or (name, *key) == self._key:
            return []
        self._is_asking, self._next_at = True, now + MIN_INTERVAL_S
        return [self._ask(name, key, ask)]

    async def _ask(self, name: str, key: tuple[object, ...], ask: Callable[[Remote], T]) -> None:
        try:
            self.answer, self.error = await self._source.ask(ask), ""
        except CommonweightError as err:
            self._is_refused = err.code == Refused.code
            self.answer, self.error = None, f"{err.message}. {err.hint}".rstrip(" .")
        finally:
            self._is_asking = False
        self.name, self._key = name, (name, *key)


class OperatorDetails:
    """The last evaluations of the peers in a run, and their shares of a job."""

    def __init__(self, source: Source) -> None:
        self._evaluations = _Reader[EvaluationsResponse](source)
        self._shares = _Reader[dict[str, JobShare]](source)

    @property
    def evaluations(self) -> Evaluations:
        """How each peer last evaluated the model, as far as it is known."""
        known = self._evaluations.answer or EvaluationsResponse()
        run, error = self._evaluations.name, self._evaluations.error
        return Evaluations(run, known.evaluations, known.comparisons, known.withheld, error)

    @property
    def shares(self) -> Shares:
        """What each peer does in the job that was asked for last."""
        return Shares(self._shares.name, self._shares.answer or {}, self._shares.error)

    def of_run(self, fleet: Fleet, now: float) -> list[Request]:
        """The request for the evaluations, if a round of the current run has closed since, or a
        peer has told something after the end. For an ended run, the coordinator reads the whole
        ledger."""
        if (run := current_run(fleet)) is None:
            return []
        name, newest = run.changed.run, run.rounds[-1].round if run.rounds else 0
        return self._evaluations.request(
            name, (newest, run.changed.compared), lambda remote: remote.evaluations(name), now
        )

    def of_job(self, job: Job, now: float) -> list[Request]:
        """The request for the shares of a job, if they may have changed since."""
        name = job.changed.job
        return self._shares.request(name, job_key(job), lambda remote: remote.job_shares(name), now)
