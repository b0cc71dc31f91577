"""Does what its run config says, such as to print without end."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
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
    if act == "link":  # in place of the folder of its runs
        Path("runs").rename("moved")
        Path("runs").symlink_to(str(context.node_config["secret"]))
    if act == "late":
        time.sleep(1)
        arrays = ArrayRecord({"w": Array(np.ones(3))})
        return Message(RecordDict({"a": arrays}), reply_to=msg)
    if act == "own":
        return Message(RecordDict({"m": MetricRecord(run_own(context))}), reply_to=msg)
    if act == "raise":
        raise ValueError("row 17: secret")
    return Message(RecordDict({"m": MetricRecord({"done": 1})}), reply_to=msg)


def run_own(context: Context) -> dict[str, int]:
    """Exit statuses of what it writes itself: Python code that reads a file, and a program."""
    Path("own.py").write_text("import sys; print('ran'); open(sys.argv[1])")
    words = [sys.executable, "own.py", str(context.node_config["secret"])]
    done = subprocess.run(words, capture_output=True, text=True)
    shutil.copyfile("/bin/sh", "sh")
    os.chmod("sh", 0o700)
    try:
        program = subprocess.run(["./sh", "-c", ""]).returncode
    except PermissionError:
        program = -1
    return {"ran": done.stdout.count("ran"), "read": done.returncode, "program": program}
