"""Pictures by address, from hosts that the operator named (``--allow-image-host``) and from nowhere else.

A host is looked up once and asked at the very address that was checked, so that a name cannot first point to a public
address and then to one of this network; redirects are not followed. A host of this network is named with its address
(``pacs.local=10.0.0.5``) and never looked up.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

import httpx

from medllava.errors import ConfigError, DataError, ImageTooLarge

CONNECT_S = 10.0
WHOLE_S = 30.0
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_hosts(named: Sequence[str]) -> dict[str, str | None]:
    """``NAME`` or ``NAME=ADDRESS`` of each host to its address, None where it is looked up. Raises ConfigError."""
    hosts: dict[str, str | None] = {}
    for entry in named:
        name, equals, address = entry.lower().partition("=")
        if not name or "/" in name or ":" in name:
            raise ConfigError(f"--allow-image-host {entry}: expected NAME or NAME=ADDRESS, without https:// or a port")
        if equals:
            try:
                ipaddress.ip_address(address)
            except ValueError as error:
                raise ConfigError(f"--allow-image-host {entry}: {address!r} is no IP address") from error
        hosts[name] = address if equals else None
    return hosts


def fetch_picture(url: str, hosts: Mapping[str, str | None], max_bytes: int) -> bytes:
    """The bytes behind ``url``. Raises DataError if its host is not among ``hosts`` or does not answer, ImageTooLarge
    beyond ``max_bytes``. No message repeats the address: a log should not hold it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise DataError("the address in image_url cannot be read") from None
    host = (parts.hostname or "").lower()
    if parts.scheme not in {"http", "https"} or host not in hosts or parts.username is not None:
        raise DataError(
            "only data URIs (data:image/png;base64,...) are accepted: this server fetches nothing from a network, but"
            " from hosts named with --allow-image-host, and opens no file for a client"
        )
    address = hosts[host] or _public_address(host)
    try:
        return _get(parts, host, address, port, max_bytes)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError(f"the host of image_url could not be asked ({type(error).__name__})") from None


def _get(parts: SplitResult, host: str, address: str, port: int | None, max_bytes: int) -> bytes:
    place = f"[{address}]" if ":" in address else address
    target = parts._replace(netloc=f"{place}:{port}" if port else place, fragment="").geturl()
    headers = {"Host": f"{host}:{port}" if port else host, "Accept": "image/*", "Accept-Encoding": "identity"}
    started = time.monotonic()
    data = bytearray()
    with (
        httpx.Client(trust_env=False, follow_redirects=False, timeout=CONNECT_S) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise DataError(f"the host of image_url answered {response.status_code}; redirects are not followed")
        for part in response.iter_raw():  # as sent: unpacked, a few bytes may be many
            data += part
            if len(data) > max_bytes:
                raise ImageTooLarge(f"the picture behind image_url has more than {max_bytes / 1e6:g} MB")
            if time.monotonic() - started > WHOLE_S:
                raise DataError(f"the host of image_url took more than {WHOLE_S:.0f} s")
    return bytes(data)


def _public_address(host: str) -> str:
    """The address of a host, looked up once. Raises DataError if any of its addresses is not of the public network."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        raise DataError("the host of image_url is not known here") from None
    for text in found:
        if not all(place.is_global and not place.is_multicast for place in _meant(ipaddress.ip_address(text))):
            raise DataError(
                "the host of image_url is in a private network; the operator can name it with its address"
                " (--allow-image-host NAME=ADDRESS)"
            )
    return found[0]


def _meant(address: Address) -> list[Address]:
    """The address, or the IPv4 addresses that an IPv6 address of a transition scheme stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    teredo = address.teredo or (None, None)
    nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
    inner = [place for place in (address.ipv4_mapped, address.sixtofour, teredo[1], nat64) if place is not None]
    return [*inner] or [address]
