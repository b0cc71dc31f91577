"""Answers of peers made one: merged, turned into figures, and shown."""
