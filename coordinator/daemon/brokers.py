"""Which MQTT broker a coordinator has, by its settings."""

from __future__ import annotations

from pathlib import Path

from coordinator.storage.settings import Keys, Settings
from coordinator.transport.external_broker import ExternalBroker
from coordinator.transport.mosquitto import MosquittoBroker, MosquittoFiles
from coordinator.transport.mqtt_access import Passwords
from coordinator.transport.mqtt_broker import EmbeddedBroker


def make_broker(
    home: Path, chosen: Settings, port: int, keys: Keys
) -> EmbeddedBroker | ExternalBroker | MosquittoBroker:
    """The external broker of the settings, or an embedded one on the port after `port`."""
    if chosen.mqtt_mosquitto:
        files = MosquittoFiles(Path(chosen.mqtt_mosquitto), keys.fleet, mqtt_passwords(keys))
        ca_pem, mqtt_port = keys.ca_pem.decode(), mosquitto_port(chosen)
        return MosquittoBroker(files, chosen.host, mqtt_port, ca_pem)
    if chosen.mqtt_url:
        return ExternalBroker(chosen.mqtt_url, Path(chosen.mqtt_ca) if chosen.mqtt_ca else None)
    return EmbeddedBroker(
        home / "broker",
        chosen.host,
        chosen.mqtt_port or (port + 1 if chosen.port else 0),
        home / "server.pem",
        home / "server.key",
        keys.fleet,
        mqtt_passwords(keys),
    )


def mqtt_passwords(keys: Keys) -> Passwords:
    """The passwords of all members for the broker."""
    return Passwords(keys.sign_key.private_bytes_raw())


def mosquitto_port(chosen: Settings) -> int:
    """Where Mosquitto listens."""
    return chosen.mqtt_port or chosen.port + 1
