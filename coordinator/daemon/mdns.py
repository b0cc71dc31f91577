"""Announces the coordinator in its network by multicast DNS, if its operator enables it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence

from zeroconf import BadTypeInNameException, Error
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from protocols.enrollment.mdns import SERVICE, encode_txt_record

log = logging.getLogger("commonweight.announce")

RETRY_S = 60.0


async def announce(
    name: str, port: int, ca_sha256: bytes, addresses: Sequence[str], interfaces: Sequence[str] = ()
) -> None:
    """Announce the coordinator until cancelled, then withdraw the announcement.

    `addresses` are IP addresses. `interfaces` are the addresses to announce on, by default all. It
    retries after errors, for example without a network. Training does not depend on it.
    """
    reported = ""
    while True:
        try:
            await _announce_once(name, port, ca_sha256, addresses, interfaces)
        except (OSError, RuntimeError, Error, BadTypeInNameException) as err:
            if str(err) != reported:
                reported = str(err)
                log.warning("cannot announce the coordinator in this network: %s", reported)
        await asyncio.sleep(RETRY_S)


async def _announce_once(
    name: str, port: int, ca_sha256: bytes, addresses: Sequence[str], interfaces: Sequence[str]
) -> None:
    """Announce it until cancelled. Raises RuntimeError (no network) and errors of zeroconf."""
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
    """The names that are IP addresses."""
    return [name for name in names if "%" not in name and _is_ip_address(name)]


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
