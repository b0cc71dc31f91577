"""Starts a trainer, or another process of the agent, in the sandbox.

    python -m agent.trainer.sandboxed MODULE OPTIONS

It imports no numeric library before the rules are in force: their threads would be free of them.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

import msgspec

from agent.policy import sandbox
from agent.policy.file_access import SandboxRules
from agent.trainer import helper
from agent.trainer.oom_kills import prefer_for_oom_kill
from agent.trainer.worker_tensors import copy_tensors


def main() -> None:
    prefer_for_oom_kill()  # the sandbox does not let it write there
    try:
        rules = msgspec.json.decode(os.environ.pop(sandbox.VARIABLE), type=SandboxRules)
        pipe = helper.start(rules) if sys.platform == "linux" and rules.tasks else None
        sandbox.enforce(rules)
        if pipe is not None:
            from agent.data import helper_requests

            helper_requests.connect(pipe)
        copy_tensors()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
