"""Whether a port answers with the certificate that it should."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path


async def served_certificate(ip: str, port: int, timeout_s: float) -> bytes | None:
    """The certificate (DER) that a port here serves, or None without a handshake in time."""
    try:
        return await _shake_hands(ip, port, timeout_s)
    except OSError:  # TimeoutError is one
        return None


async def is_blocked(ip: str, port: int, timeout_s: float) -> bool:
    """True if the server at a port neither does a handshake nor closes the connection in time.

    One that closes it is at a limit of its connections, and works.
    """
    try:
        await _shake_hands(ip, port, timeout_s)
    except (TimeoutError, ConnectionRefusedError):
        return True
    except OSError:  # an end of the connection in the handshake is one
        return False
    return False


async def _shake_hands(ip: str, port: int, timeout_s: float) -> bytes | None:
    """The certificate (DER), unverified: the caller compares it with ours. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ip, ip)
    async with asyncio.timeout(timeout_s):
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    served: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return served


def first_certificate(path: Path) -> bytes:
    """The DER form of the first certificate in a PEM file."""
    text = path.read_text()
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN") : text.index(end) + len(end)])
