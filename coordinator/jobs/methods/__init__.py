"""Statistical methods over the tables of all peers: tests, models, survival, meta-analysis. Pure.

A method is a generator: it yields a question, gets the merged answers of all peers, and returns its
result. `requests` reads what a person writes. Imported by `remote`, `cli` and the Python API.
"""
