"""One question answered in a process of its own: `python -m agent.analytics`, an `Order` on stdin.

The agent itself stays small: what reads tables takes more memory than all the rest of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from agent.analytics.answer import answer_question
from agent.analytics.child_process import AnswerRequest
from agent.analytics.query_log import QueryLog


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no part of the answer
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=AnswerRequest)
    memory = QueryLog(Path(order.memory))
    answers.write(answer_question(order.question, order.table, order.limits, memory))
    memory.close()
    answers.close()


if __name__ == "__main__":
    main()
