"""A run: a pure state machine over the ledger, and the loop that carries out its decisions.

Imported by `jobs` and the layers above it.
"""
