"""Sums of columns: an app without arrays."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("sums")
def query(msg: Message, context: Context) -> Message:
    names = msg.content["config"]["names"]
    sums = MetricRecord({f"{name}_sum": 100.0 + len(name) for name in names})
    return Message(RecordDict({"sums": sums}), reply_to=msg)
