"""Answers one query in its own process: `python -m agent.analytics`, an `AnswerRequest` on stdin.

This keeps the agent small, because the table readers need more memory than the agent.
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
    os.dup2(2, 1)  # output of libraries must not mix with the answer
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=AnswerRequest)
    memory = QueryLog(Path(order.memory))
    answers.write(answer_question(order.question, order.table, order.limits, memory))
    memory.close()
    answers.close()


if __name__ == "__main__":
    main()
