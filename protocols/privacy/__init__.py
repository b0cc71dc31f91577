"""Differential privacy: events that cost privacy, and what they cost together. Pure."""
