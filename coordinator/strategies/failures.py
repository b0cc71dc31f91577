"""Converts exceptions of strategies into errors that end the run, not the coordinator."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from protocols.errors import CommonweightError, StrategyFailed
from protocols.local.disk_space import is_disk_full
from protocols.messages.envelope import strip_controls

log = logging.getLogger("commonweight.run")

_MAX_CHARACTERS = 400


@contextlib.contextmanager
def strategy_errors(name: str) -> Iterator[None]:
    """Wrap a call of the strategy `name`. Raises StrategyFailed instead of its exceptions.

    Errors of a full disk pass through, since the run then waits for space. So do our own errors.
    """
    try:
        yield
    except CommonweightError:
        raise
    except (Exception, SystemExit) as err:  # a strategy may be custom code
        if is_disk_full(err):
            raise
        log.exception("the strategy %s failed", name)
        what = strip_controls(f"{type(err).__name__}: {err}"[:_MAX_CHARACTERS])
        raise StrategyFailed(
            f"the strategy {name} failed: {what}", "the coordinator's log has the traceback"
        ) from err
