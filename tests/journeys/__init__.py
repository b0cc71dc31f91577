"""User journeys: generated sequences of operations on a real fleet. `make journeys MINUTES=30`

`model` is the fleet as it should be, `operations` change the model and the fleet, `invariants` are
checked after each step, and `machine` chooses the sequences.
"""
