"""A whole task of one's own: a line through points, by gradient descent. Needs numpy alone.

Each peer has a text file of "x y" lines. Register it on each: commonweight-agent task add
./line.py:Line; then, on the coordinator: commonweight run start line.py:Line --set lr=0.1
"""

import numpy as np


class Line:
    version = "1"  # peers with another one get an error before round 1

    def schema(self, settings):
        """Names, dtypes and shapes of what is averaged."""
        return {"slope": ("F32", (1,)), "intercept": ("F32", (1,))}

    def init(self, seed, settings):
        return {name: np.zeros(1, np.float32) for name in self.schema(settings)}

    def load(self, data):
        """`data.path` is what the owner gave as --data; it is seen by this process alone."""
        points = np.loadtxt(data.path, np.float32, ndmin=2)
        self.x, self.y = points[:, 0], points[:, 1]

    def train(self, weights, settings, on_step):
        slope, intercept = weights["slope"].copy(), weights["intercept"].copy()
        steps, lr = int(settings.get("steps", 20)), float(settings.get("lr", 0.1))
        for step in range(1, steps + 1):
            error = slope * self.x + intercept - self.y
            slope -= lr * (error * self.x).mean()
            intercept -= lr * error.mean()
            on_step(step, steps, float((error**2).mean()), step * len(self.x))
        return {"slope": slope, "intercept": intercept}, len(self.x), {}

    def evaluate(self, weights, settings, on_step):
        error = weights["slope"] * self.x + weights["intercept"] - self.y
        return len(self.x), {"loss": float((error**2).mean())}

    def predict(self, weights, settings, source):  # may be left out
        x = np.loadtxt(source, np.float32, ndmin=1)
        yield {"x": x, "y": weights["slope"] * x + weights["intercept"]}
