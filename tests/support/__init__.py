"""Helpers that several test files share: small fleets, tables, waiting."""
