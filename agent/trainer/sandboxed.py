"""Starts a trainer, or another process of the agent, in the sandbox.

    python -m agent.trainer.sandboxed MODULE OPTIONS

It imports no numeric library before the rules are in force: their threads would be free of them.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from multiprocessing.connection import Connection

from agent.policy import sandbox
from agent.trainer import helper
from agent.trainer.oom_kills import prefer_for_oom_kill
from agent.trainer.worker_tensors import copy_tensors
from protocols.local.programs import forget_secrets

#: The file descriptor of the pipe to the helper.
_PIPE = "COMMONWEIGHT_AGENT_TRAINER_HELPER"


def main() -> None:
    prefer_for_oom_kill()  # the sandbox does not let it write there
    try:
        rules = sandbox.take_rules()
        is_inside = sandbox.has_restarted()
        if sys.platform == "linux" and rules.tasks and not is_inside:
            os.environ[_PIPE] = str(helper.start(rules))
            # A process keeps the variables with which it has started, and a task reads them.
            if forget_secrets(os.environ) and not rules.bwrap:
                sandbox.restart(rules, "agent.trainer.sandboxed")
        if rules.bwrap and not is_inside:
            sandbox.restart_in_bubblewrap(rules, "agent.trainer.sandboxed")
        sandbox.enforce(rules)
        if pipe := os.environ.pop(_PIPE, ""):
            from agent.data import helper_requests

            os.set_inheritable(int(pipe), False)
            helper_requests.connect(Connection(int(pipe)))
        copy_tensors()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
