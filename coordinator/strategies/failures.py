"""Turns whatever a strategy raises into an error that ends the run and not the coordinator."""

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
    """Wrap a call into the strategy `name`. Raises StrategyFailed in place of what it raises.

    A full disk passes through: the run waits for room. So do this project's own errors.
    """
    try:
        yield
    except CommonweightError:
        raise
    except (Exception, SystemExit) as err:  # a strategy may be anybody's code
        if is_disk_full(err):
            raise
        log.exception("the strategy %s failed", name)
        what = strip_controls(f"{type(err).__name__}: {err}"[:_MAX_CHARACTERS])
        raise StrategyFailed(
            f"the strategy {name} failed: {what}", "the coordinator's log has the traceback"
        ) from err
