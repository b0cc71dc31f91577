"""Identities, join tickets and signed requests. Pure."""
