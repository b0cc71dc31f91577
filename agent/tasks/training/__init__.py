"""What built-in tasks share: training loops, devices, hyperparameters, file readers.

Imported by the tasks beside it.
"""
