"""The long-running process: state machine, loops, status. Only `cli` imports it."""
