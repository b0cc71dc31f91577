"""Flower, HTTP, MQTT and the transfer of weights.

Imported by `strategies` and the layers above it.
"""
