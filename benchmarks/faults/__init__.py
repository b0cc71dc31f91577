"""Faults in real processes and in a simulator: `make faults`, `make soak`, `make month`."""
