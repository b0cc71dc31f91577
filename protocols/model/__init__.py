"""Weights, schemas and model cards: types and files.

Imported by `codecs` and by both programs.
"""
