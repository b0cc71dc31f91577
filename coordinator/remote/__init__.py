"""Clients of the coordinator's API: requests, event sources, recordings, run options.

Imported by `monitor`, `admin` and `cli`.
"""
