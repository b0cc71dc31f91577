"""Predictions from the shared model on this machine: files and a local server.

Imported by `trainer`, `clientapp`, `daemon` and `cli`.
"""
