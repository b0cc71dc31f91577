"""Files on disk: the ledger, versions of the weights, settings.

Any layer above may import it; it imports none of them.
"""
