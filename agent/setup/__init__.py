"""Joining a fleet, checking a machine, installing the service.

Imported by `daemon` and `cli`.
"""
