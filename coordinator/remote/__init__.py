"""Clients of the coordinator's API: requests, sources of fleet state, recordings, run options.

Imported by `monitor`, `admin` and `cli`.
"""
