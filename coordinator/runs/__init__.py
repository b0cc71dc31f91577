"""Training runs: a pure state machine over the ledger, and the loop that carries out its steps.

`jobs` and the layers above it may import it.
"""
