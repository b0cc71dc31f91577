"""Asks one node once; or does what its run config says."""

import contextlib
import os
import stat
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    act = context.run_config["act"]
    if act in ("frame", "garbage"):  # to the pipe itself: a frame that is too long, or none
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b"\xff" * 4 if act == "frame" else b"\4\0\0\0abcd")
        time.sleep(600)
    if act == "exit":
        os._exit(7)
    if act == "keys":
        print(Path(str(context.run_config["path"])).read_text())
    nodes = list(grid.get_node_ids())
    replies = list(grid.send_and_receive([Message(RecordDict(), nodes[0], "query")]))
    if replies[0].has_error():
        raise RuntimeError(f"error {replies[0].error.code}: {replies[0].error.reason}")
