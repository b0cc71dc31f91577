"""Weights, schemas and model cards: types and files. Pure.

Imported by `codecs` and by both programs.
"""
