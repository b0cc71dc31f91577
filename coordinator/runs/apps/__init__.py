"""Runs of Flower apps: a ServerApp in a child process decides, over the run's own messages.

`loop` drives such a run in place of `coordinator.runs.loop`.
"""
