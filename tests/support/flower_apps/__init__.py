"""Small Flower apps for tests, each in a folder of its own."""

from pathlib import Path

FOLDER = Path(__file__).parent
