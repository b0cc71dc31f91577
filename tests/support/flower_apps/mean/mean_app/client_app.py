"""Adds the partition's number to each weight, and counts its rounds in its context."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    time.sleep(context.run_config["seconds"])
    rounds = context.state["rounds"]["done"] if "rounds" in context.state else 0
    context.state["rounds"] = MetricRecord({"done": rounds + 1})
    context.state["kept"] = ArrayRecord([np.full(3, rounds + 1.0)])
    step = float(context.node_config["partition-id"]) + 1
    state = {key: array.numpy() + step for key, array in msg.content["arrays"].items()}
    arrays = ArrayRecord({key: Array(np.asarray(value)) for key, value in state.items()})
    metrics = MetricRecord({"num-examples": 10, "rounds": rounds + 1, "train_loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    first = float(next(iter(msg.content["arrays"].values())).numpy().ravel()[0])
    metrics = MetricRecord({"num-examples": 10, "loss": 10.0 - first, "all": [1.0, 2.0]})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
