"""Does what its run config says, such as to print without end."""

import os
import subprocess
import sys
import time
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(msg: Message, context: Context) -> Message:
    act = context.run_config["act"]
    if act == "print":
        for _ in range(100_000):
            print("x" * 100)
            os.write(1, b"\n\xff{}\n")
    if act == "fork":
        for _ in range(5):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    if act == "read":
        found = Path(str(context.node_config["secret"])).read_text()
        return Message(RecordDict({"m": MetricRecord({"found": len(found)})}), reply_to=msg)
    if act == "many":
        values = {f"value-{number:06}": number for number in range(60_000)}
        return Message(RecordDict({"m": MetricRecord(values)}), reply_to=msg)
    if act == "raise":
        raise ValueError("row 17: secret")
    return Message(RecordDict({"m": MetricRecord({"done": 1})}), reply_to=msg)
