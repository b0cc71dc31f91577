"""Secure runs: the coordinator sees the sum of a round's updates and no single one.

`decisions` and `transitions` are pure; `sums` carries out the steps of one sum, and `fold` makes
the version. Imported by the other modules of `runs`; imports `runs.state` and below.
"""
