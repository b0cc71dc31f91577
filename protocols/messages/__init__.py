"""Messages on the wire, MQTT topics, the states of peers and runs. Pure."""
