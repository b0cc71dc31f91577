"""A NumPyClient."""

import numpy as np
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp


class Client(NumPyClient):
    def get_parameters(self, config):
        return [np.zeros(3, np.float32)]

    def fit(self, parameters, config):
        return [array + 1 for array in parameters], 5, {"train_loss": 2.0}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 5, {"accuracy": 0.5}


def client_fn(context: Context):
    return Client().to_client()


app = ClientApp(client_fn=client_fn)
