"""The long-running program on a machine that holds private data."""
