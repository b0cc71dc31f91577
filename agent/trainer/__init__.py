"""The trainer: a child process that holds the model and the data. Run as `agent.trainer`.

The parent uses `process` and `supervisor`. Imported by `analytics`, `daemon` and `cli`.
"""
