"""Asks all nodes once, and writes the sums to a file."""

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    names = context.run_config["values"].split(",")
    content = RecordDict({"config": ConfigRecord({"names": names, "key": b"bytes"})})
    nodes = list(grid.get_node_ids())
    asked = [Message(content, node, "query.sums") for node in nodes]
    replies = [reply.content["sums"] for reply in grid.send_and_receive(asked)]
    total = {name: sum(reply[f"{name}_sum"] for reply in replies) for name in names}
    Path("sums.json").write_text(json.dumps(total))
