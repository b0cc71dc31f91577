"""When the agent may work: rules, schedules and sensor readings. Pure but for the sensors.

Any layer above may import it.
"""
