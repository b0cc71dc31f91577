"""Federated averaging of zeros, and a file with the result."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    size, nodes = context.run_config["model.size"], context.run_config["min-nodes"]
    first = {"w": np.zeros((size, 2), np.float32), "b": np.zeros((), np.float64)}
    arrays = ArrayRecord({key: Array(value) for key, value in first.items()})
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    rounds = context.run_config["num-server-rounds"]
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
    np.savez("final.npz", *result.arrays.to_numpy_ndarrays())
    print("the end of", context.run_config["title"])
