"""Helpers that touch this machine: files, locks, threads, the entry point of the commands.

Imported by `codecs` and `model` for their files, and by both programs. The rest of `protocols`
is pure.
"""
