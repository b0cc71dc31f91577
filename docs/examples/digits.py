import numpy as np
from torch import nn

import commonweight as cw


class Digits(cw.TorchTask):
    def model(self, settings):
        layers = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))

    def data(self, source, settings):
        x, y = np.load(source.path)["x"], np.load(source.path)["y"]  # [n, 1, 8, 8] and [n]
        return (x[100:], y[100:]), (x[:100], y[:100])
