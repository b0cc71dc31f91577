"""What the owner of this machine wants of a running agent, found in its two files."""

from __future__ import annotations

import time
from pathlib import Path

from agent.daemon.event_loop import WorkerLoop
from agent.daemon.policy_loop import Polite
from agent.daemon.state_machine import FinishAsked, PauseAsked, PauseLifted
from agent.home import status_files
from agent.home.status_files import Wish
from protocols.local.disk_space import is_full
from protocols.messages.states import PauseReason

_OWN = frozenset({PauseReason.USER})
_ASKED_FOR = _OWN | {PauseReason.OPERATOR, PauseReason.TRAINER}


class Owner:
    """Looks at the wish file and the settings, and tells the worker and the policy."""

    def __init__(self, home: Path, loop: WorkerLoop, polite: Polite) -> None:
        self._home, self._loop, self._polite = home, loop, polite
        self._wish = Wish()

    def heed(self) -> bool:
        """Obey what is new; True if the settings may have changed."""
        wish = status_files.read_wish(self._home)
        over = wish.want == "pause" and 0 < wish.until <= time.time()
        if over:
            wish = Wish(modes=wish.modes)
            self._keep(wish)
        changed = self._polite.heed(wish)
        if (wish.want, wish.until, wish.at) == (self._wish.want, self._wish.until, self._wish.at):
            return changed
        self._wish = wish
        if wish.want == "pause":
            self._loop.happened(PauseAsked(PauseReason.USER, wish.until))
        else:
            # The owner's word also lifts what the operator asked for; the clock says no word.
            self._loop.happened(PauseLifted(_OWN if over else _ASKED_FOR))
        if wish.want == "finish":
            kept = Wish(modes=wish.modes)
            if self._keep(kept):
                self._wish = kept  # or else it would look like a new one, and lift every pause
            self._loop.happened(FinishAsked())
        return changed

    def _keep(self, wish: Wish) -> bool:
        """What was asked for is over. On a full disk it is still written there, and over again."""
        try:
            status_files.write_wish(self._home, wish)
        except OSError as err:
            if not is_full(err):
                raise
            return False
        return True
