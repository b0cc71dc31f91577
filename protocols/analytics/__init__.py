"""Federated analytics: queries over tables of all peers, and the statistics that answer them.

A query is a list of declarative operations. Each peer answers with sufficient statistics, which
merge to those of all rows. There are no joins, no shuffles and no code from the coordinator.
"""
