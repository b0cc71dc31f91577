"""Federated analytics: questions about tables that stay where they are, and how answers merge.

A question is a few declarative operations; each peer answers with sufficient statistics that merge
to those of all rows together. There is no join, no shuffle and no code.
"""
