"""Helpers for files, locks, threads and the entry point of the commands. Not pure.

Imported by `codecs` and `model` for their files, and by both programs.
"""
