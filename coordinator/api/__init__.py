"""The HTTP routes. Imported by `daemon` and the layers above it."""
