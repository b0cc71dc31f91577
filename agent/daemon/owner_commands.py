"""What the owner of this machine wants of a running agent, found in its two files."""

from __future__ import annotations

import time
from pathlib import Path

from agent.daemon.policy_loop import PolicyLoop
from agent.daemon.state_machine import FinishRequested, PauseLifted, PauseRequested
from agent.daemon.state_runner import StateRunner
from agent.home import status_files
from agent.home.status_files import OwnerRequest
from protocols.local.disk_space import is_disk_full
from protocols.messages.states import PauseReason

_OWN_PAUSE = frozenset({PauseReason.USER})
_LIFTED_BY_OWNER = _OWN_PAUSE | {PauseReason.OPERATOR, PauseReason.TRAINER}


class OwnerCommands:
    """Looks at the wish file and the settings, and tells the worker and the policy."""

    def __init__(self, home: Path, runner: StateRunner, policy: PolicyLoop) -> None:
        self._home, self._runner, self._policy = home, runner, policy
        self._request = OwnerRequest()

    def poll(self) -> bool:
        """Obey what is new; True if the settings may have changed."""
        wish = status_files.read_request(self._home)
        over = wish.want == "pause" and 0 < wish.until <= time.time()
        if over:
            wish = OwnerRequest(modes=wish.modes)
            self._save(wish)
        changed = self._policy.reload(wish)
        if (wish.want, wish.until, wish.at) == (
            self._request.want,
            self._request.until,
            self._request.at,
        ):
            return changed
        self._request = wish
        if wish.want == "pause":
            self._runner.dispatch(PauseRequested(PauseReason.USER, wish.until))
        else:
            # The owner's word also lifts what the operator asked for; the clock says no word.
            self._runner.dispatch(PauseLifted(_OWN_PAUSE if over else _LIFTED_BY_OWNER))
        if wish.want == "finish":
            kept = OwnerRequest(modes=wish.modes)
            if self._save(kept):
                self._request = kept  # or else it would look like a new one, and lift every pause
            self._runner.dispatch(FinishRequested())
        return changed

    def _save(self, wish: OwnerRequest) -> bool:
        """What was asked for is over. On a full disk it is still written there, and over again."""
        try:
            status_files.write_request(self._home, wish)
        except OSError as err:
            if not is_disk_full(err):
                raise
            return False
        return True
