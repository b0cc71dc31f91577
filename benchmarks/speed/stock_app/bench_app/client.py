"""The ClientApp: returns the weights plus 1, like the `ping` task."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    arrays = ArrayRecord(
        {
            name: Array(np.add(array.numpy(), 1, dtype=np.float32))
            for name, array in message.content.array_records["arrays"].items()
        }
    )
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, _: Context) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)
