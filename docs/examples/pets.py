from torch import nn

import commonweight as cw


class Pets(cw.TorchTask):
    def model(self, settings):
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(8), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(16 * 8 * 8, 2))

    def data(self, source, settings):
        return cw.pictures(source, classes=("cat", "dog"), size=64)
