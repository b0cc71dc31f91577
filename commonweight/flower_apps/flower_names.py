"""Flower's private names for the processes that run apps (flwr 1.41 and 1.42; contract tests).

Importing it switches Flower's telemetry and its search for updates off.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

#: The id of the sender of a ServerApp's messages.
SERVER_NODE = 1


def become(run: int) -> None:
    """Let this process make messages of this run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, SERVER_NODE, run


def name_message(message: Message, message_id: str) -> None:
    """Give a message its id, to which replies refer."""
    message.metadata.__dict__["_message_id"] = message_id


def reply(asked: Message, content: RecordDict | Error) -> Message:
    """The reply to a message, with the records or the error."""
    return Message(content, reply_to=asked)
