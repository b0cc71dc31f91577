"""Appends numbered entries to the ledger ADDRESS and prints each number once it is acknowledged.

python -m tests.extras.cluster.writer ADDRESS
It ends when its input is closed.
"""

from __future__ import annotations

import itertools
import select
import sys
import time

from coordinator.storage.postgres_ledger import PostgresLedger
from protocols.errors import LedgerUnreachable
from tests.extras.cluster.conftest import FLEET


def main(address: str) -> None:
    ledger = PostgresLedger(address, FLEET)
    print("open", flush=True)
    for number in itertools.count():
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        while True:
            try:
                ledger.append("run", [b"%d" % number, b"%d again" % number])
                break
            except LedgerUnreachable:
                time.sleep(0.1)
        print(number, flush=True)
    ledger.close()


if __name__ == "__main__":
    main(sys.argv[1])
