"""Signed messages between agents about versions. Pure."""
