"""The coordinator process: builds all parts, starts and supervises them.

Imported by `admin` and `cli`.
"""
