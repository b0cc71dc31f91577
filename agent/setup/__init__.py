"""Joins a fleet, checks the machine, installs the service.

Imported by `daemon` and `cli`.
"""
