"""Answers to analytics queries from this peer's own table, with disclosure control.

The audit log records an answer before it leaves. Imported by `daemon` and `cli`.
"""
