"""Find the address and the interface by which this machine talks to another.

Responsible for: asking the system for the route. Not responsible for: whether the other machine answers
(rendezvous.py).
"""

import ipaddress
import socket

import psutil  # type: ignore[import-untyped]


def address_towards(host: str, port: int) -> str:
    """Return the address that `host` sees when this machine connects to it."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a datagram socket sends nothing here: only the route is looked up
        return str(probe.getsockname()[0])


def interface_towards(host: str, port: int) -> str | None:
    """Return the name of the network interface on the route to `host`; None if no interface has that address."""
    address = address_towards(host, port)
    wanted = {address}
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        wanted.add("127.0.0.1")  # the system lists only the first of the loopback addresses
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if wanted & {entry.address for entry in entries}), None)
