"""Who is in the fleet and who is online: registry, sessions, the fleet reducer and its readings.

Imported by `transport` and the layers above it.
"""
