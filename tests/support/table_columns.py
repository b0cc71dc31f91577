"""Prints the columns of the table that the first argument names."""

from __future__ import annotations

import sys

from agent.data import open_table
from agent.data.settings import DataSettings

if __name__ == "__main__":
    print(open_table(DataSettings(path=sys.argv[1])).columns())
