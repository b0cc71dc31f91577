"""The Flower ClientApp: a request comes in, work is done, a signed answer goes out.

Imported by `analytics`, `daemon` and `cli`.
"""
