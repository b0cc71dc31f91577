"""Addresses, backoff, version checks, texts for network errors. Pure; imports only `errors`."""
