"""Appends numbered entries to the ledger ADDRESS and prints each number once it is acknowledged.

python -m tests.extras.cluster.writer ADDRESS FIRST COUNT
"""

from __future__ import annotations

import sys
import time

from coordinator.storage.postgres_ledger import PostgresLedger
from protocols.errors import LedgerUnreachable
from tests.extras.cluster.conftest import FLEET


def main(address: str, first: int, count: int) -> None:
    ledger = PostgresLedger(address, FLEET)
    print("open", flush=True)
    for number in range(first, first + count):
        while True:
            try:
                ledger.append("run", [b"%d" % number, b"%d again" % number])
                break
            except LedgerUnreachable:
                time.sleep(0.1)
        print(number, flush=True)
    ledger.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
