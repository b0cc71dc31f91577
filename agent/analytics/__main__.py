"""Answers one query in its own process: `python -m agent.analytics HOME`, a `Query` and an
`QuestionContext` as JSON on stdin.

This keeps the agent small, because the table readers need more memory than the agent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog, QuestionContext, log_file
from agent.data.table_memory import TableMemory
from agent.home import settings
from protocols.analytics.query import Query


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the answer
    question, asked = msgspec.json.decode(
        sys.stdin.buffer.read(), type=tuple[Query, QuestionContext]
    )
    home = Path(sys.argv[1])
    chosen = settings.read(home)
    log, memory = QueryLog(log_file(home)), TableMemory(settings.memory_file(home))
    answers.write(answer_question(question, chosen, home / "analysis", log, memory, asked))
    memory.close()
    log.close()
    answers.close()


if __name__ == "__main__":
    main()
