"""Jobs between rounds: inference and analytics on the peers. A pure state machine and its loop.

Imported by `api` and the layers above it.
"""
