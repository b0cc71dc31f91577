"""Many peers on one machine: the real run loop and ClientApps, with a pool of workers for peers.

A simulated run has the digests of a deployed one. What is left out is the network between both: no
HTTP, TLS and MQTT, no sandbox, and no trainer process for each peer.
"""
