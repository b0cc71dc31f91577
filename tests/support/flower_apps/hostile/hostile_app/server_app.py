"""Asks one node once; or does what its run config says."""

import os

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    act = context.run_config["act"]
    if act == "frame":  # more than a frame may have, to the pipe itself
        os.write(int(os.environ["PIPE_FOR_TESTS"]), b"\xff\xff\xff\xff")
    nodes = list(grid.get_node_ids())
    replies = list(grid.send_and_receive([Message(RecordDict(), nodes[0], "query")]))
    if replies[0].has_error():
        raise RuntimeError(f"error {replies[0].error.code}: {replies[0].error.reason}")
