"""The monitor: the fleet in a terminal. The only package that imports Textual."""
