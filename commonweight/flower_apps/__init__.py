"""The processes that run Flower apps: `client` on an agent, `server` beside a coordinator.

They are programs that agents and coordinators start, as both need the same records. Only
`flower_names` here uses Flower's private names.
"""
