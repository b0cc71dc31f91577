"""Connections to the coordinator: HTTP requests, weight transfer, MQTT.

Imported by `clientapp`, `analytics`, `daemon` and `cli`.
"""
