import keras
import numpy as np

import commonweight as cw


class Digits(cw.KerasTask):
    def model(self, settings):
        image, layers = keras.Input((8, 8, 1)), keras.layers
        hidden = layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)
        return keras.Sequential([image, *hidden, layers.Flatten(), layers.Dense(10)])

    def data(self, source, settings):
        x, y = np.load(source.path)["x"], np.load(source.path)["y"]  # [n, 8, 8, 1] and [n]
        return (x[100:], y[100:]), (x[:100], y[:100])
