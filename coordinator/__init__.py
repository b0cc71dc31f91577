"""The program that aggregates updates, and the monitor that watches it."""
