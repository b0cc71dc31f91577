"""Answers from this peer's own table: computed here, guarded, written down, and only then told."""
