"""The monitor: tables, charts and alerts as pure functions, and the terminal UI.

Only `cli` imports it.
"""
