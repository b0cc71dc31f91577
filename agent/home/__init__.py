"""The agent's folder: settings, keys, logs, audit log, state of runs.

Any layer above may import it.
"""
