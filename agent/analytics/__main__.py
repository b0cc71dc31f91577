"""Answers one query in its own process: `python -m agent.analytics HOME JOB FLEET [secure]`, a
`Query` on stdin.

This keeps the agent small, because the table readers need more memory than the agent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog, log_file
from agent.data.table_memory import TableMemory
from agent.home import settings
from protocols.analytics.query import Query


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answer
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Query)
    home, asked_by = Path(sys.argv[1]), (sys.argv[2], sys.argv[3])
    chosen = settings.read(home)
    log, memory = QueryLog(log_file(home)), TableMemory(settings.memory_file(home))
    secure = sys.argv[4:] == ["secure"]
    answers.write(
        answer_question(question, chosen, home / "analysis", log, memory, asked_by, secure=secure)
    )
    memory.close()
    log.close()
    answers.close()


if __name__ == "__main__":
    main()
