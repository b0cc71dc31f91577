"""Addresses, back-off, version checks, text for network errors. Pure; imports nothing here."""
