"""Versions of the weights between agents: who has which, and downloads from peers.

Imported by `agent.transport` and the layers above it.
"""
