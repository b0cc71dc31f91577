"""Announces the coordinator in its network by multicast DNS, if its operator asks for it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from zeroconf import BadTypeInNameException, Error
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from protocols.enrollment.mdns import SERVICE, encode_txt_record

log = logging.getLogger("commonweight.announce")

RETRY_S = 60.0


async def announce(
    name: str, port: int, ca_sha256: bytes, addresses: Sequence[str], interfaces: Sequence[str] = ()
) -> None:
    """Say where the coordinator is until cancelled; then take it back.

    `addresses` are IP addresses. `interfaces`: addresses on which to speak, else all. Where that
    cannot be done, as before there is a network, it is tried again: training needs none of it.
    """
    told = ""
    while True:
        try:
            await _announce_once(name, port, ca_sha256, addresses, interfaces)
        except (OSError, RuntimeError, Error, BadTypeInNameException) as err:
            if str(err) != told:
                told = str(err)
                log.warning("cannot announce the coordinator in this network: %s", told)
        await asyncio.sleep(RETRY_S)


async def _announce_once(
    name: str, port: int, ca_sha256: bytes, addresses: Sequence[str], interfaces: Sequence[str]
) -> None:
    """Announce it until cancelled. Raises RuntimeError (no network) and what zeroconf raises."""
    network = AsyncZeroconf(interfaces=list(interfaces)) if interfaces else AsyncZeroconf()
    try:
        host = "".join(letter if letter.isalnum() else "-" for letter in name)[:40] or "coordinator"
        info = AsyncServiceInfo(
            SERVICE,
            f"{host}-{ca_sha256[:4].hex()}.{SERVICE}",
            port=port,
            properties=encode_txt_record(name, ca_sha256),
            server=f"{host}-{ca_sha256[:4].hex()}.local.",
            parsed_addresses=list(addresses),
        )
        await network.async_register_service(info, allow_name_change=True)
        log.info("announced in this network: commonweight-agent join finds it")
        await asyncio.Event().wait()
    finally:
        await network.async_close()


def ip_addresses(names: Sequence[str]) -> list[str]:
    """Those of `names` that are IP addresses."""
    found = []
    for name in names:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, name)
            except OSError:
                continue
            found.append(name)
    return found
