"""The monitor: tables, charts and alerts as pure functions, and the terminal UI in `tui`.

Only `cli` imports it.
"""
