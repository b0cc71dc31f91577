"""Asks one node once; or does what its run config says."""

import contextlib
import os
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from coordinator.runs.apps import frames

app = ServerApp()
#: To the pipe itself: a frame that is too long, one that is none, and many at once.
RAW = {
    "frame": b"\xff" * 4,
    "garbage": b"\4\0\0\0abcd",
    "many frames": frames.encode(frames.NodesAsked()) * 2000 + frames.encode(frames.End()),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    act = context.run_config["act"]
    if act in RAW:
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, RAW[act])
        time.sleep(600)
    if act == "exit":
        os._exit(7)
    if act == "keys":
        print(Path(str(context.run_config["path"])).read_text())
    nodes = list(grid.get_node_ids())
    if act == "flood":
        large = grid._pack(RecordDict({"c": ConfigRecord({"x": "y" * 500_000})}))
        message = frames.Outgoing(content=0, node=nodes[0], message_type="query")
        grid._ask(frames.Push(contents=(large,), messages=(message,) * 600))
    if act == "old":
        send_old_arrays(grid, nodes[0])
    if act == "late":  # this reply is taken by nobody
        message = Message(RecordDict(), nodes[0], "query")
        print(list(grid.send_and_receive([message], timeout=0.1)))
    replies = list(grid.send_and_receive([Message(RecordDict(), nodes[0], "query")]))
    if act == "late":
        print("files:", os.listdir("in"))
    if replies[0].has_error():
        raise RuntimeError(f"error {replies[0].error.code}: {replies[0].error.reason}")


def send_old_arrays(grid: Any, node: int) -> None:
    """Send two contents in each round; from the fourth on, also one of two rounds before."""
    packed: list[frames.Content] = []
    for number in range(1, 6):
        packed.append(grid._pack(arrays(number)))
        contents = [packed[-1], grid._pack(arrays(100 + number)), *packed[-3:-2][: number > 3]]
        messages = tuple(
            frames.Outgoing(content=index, node=node, message_type="query")
            for index in range(len(contents))
        )
        ids = grid._ask(frames.Push(contents=tuple(contents), messages=messages)).ids
        came = 0
        while came < len(ids):
            came += len(grid._ask(frames.Pull(ids=ids, wait_s=1.0)).replies)


def arrays(number: int) -> RecordDict:
    """A message of a round."""
    values = ArrayRecord({"w": Array(np.full(3, float(number)))})
    return RecordDict({"arrays": values, "config": ConfigRecord({"server-round": number})})
