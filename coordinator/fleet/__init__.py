"""Who is in the fleet and who is online: registry, sessions, the fleet reducer.

Imported by `transport` and the layers above it.
"""
