"""Reads what the owner asks of a running agent, from two files in its home."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agent.daemon.policy_loop import PolicyLoop
from agent.daemon.state_machine import (
    LIFTED_BY_OPERATOR,
    FinishRequested,
    PauseLifted,
    PauseRequested,
)
from agent.daemon.state_runner import StateRunner
from agent.home import status_files
from agent.home.status_files import OwnerRequest
from protocols.local.disk_space import is_disk_full
from protocols.messages.states import PauseReason

_OWN_PAUSE = frozenset({PauseReason.USER})
_LIFTED_BY_OWNER = _OWN_PAUSE | LIFTED_BY_OPERATOR


class OwnerCommands:
    """Polls the owner's request and settings, and passes changes to the state and the policy."""

    def __init__(self, home: Path, runner: StateRunner, policy: PolicyLoop) -> None:
        self._home, self._runner, self._policy = home, runner, policy
        self._request = OwnerRequest()
        self._restart_at = status_files.read_request(home).restart_at
        #: Called when the owner asks for a restart.
        self.on_restart: Callable[[], None] = lambda: None

    def drop_finish(self) -> None:
        """At the start: drop a `finish` for an earlier process, which ended before it read it."""
        request = status_files.read_request(self._home)
        if request.want == "finish":
            self._save(request.asking("run"))

    def poll(self) -> bool:
        """Obey a new request. True if the settings may have changed."""
        request = status_files.read_request(self._home)
        expired = request.want == "pause" and 0 < request.until <= time.time()
        if expired:
            request = request.asking("run")
            self._save(request)
        changed = self._policy.reload(request)
        if request.restart_at > self._restart_at:
            self._restart_at = request.restart_at
            self.on_restart()
        last = self._request
        if (request.want, request.until, request.at) == (last.want, last.until, last.at):
            return changed
        self._request = request
        if request.want == "pause":
            self._runner.dispatch(PauseRequested(PauseReason.USER, request.until))
        else:
            # A request also lifts the operator's pause; the end of the owner's own pause does not.
            self._runner.dispatch(PauseLifted(_OWN_PAUSE if expired else _LIFTED_BY_OWNER))
        if request.want == "finish":
            done = request.asking("run")
            if self._save(done):
                self._request = done  # else the next poll would treat it as new, and lift pauses
            self._runner.dispatch(FinishRequested())
        return changed

    def _save(self, request: OwnerRequest) -> bool:
        """Replace a request that is done. False if the disk is full: the file keeps the old one."""
        try:
            status_files.write_request(self._home, request)
        except OSError as err:
            if not is_disk_full(err):
                raise
            return False
        return True
