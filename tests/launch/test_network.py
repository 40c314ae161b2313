"""The route is the system's own: over its loopback interface, and over none where no address leads."""

import socket
import sys

import psutil
import pytest

from dovetail.launch.network import address_towards, interface_towards

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of interfaces, and all of 127.0.0.0/8")


def test_the_way_to_a_loopback_address_is_the_loopback_interface() -> None:
    for host in ("127.0.0.1", "127.0.0.2"):
        assert interface_towards(host, 29500) == "lo"


def test_the_way_to_an_address_of_this_machine_is_the_interface_that_has_it() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for address in (entry.address for entry in entries if entry.family == socket.AF_INET):
            assert address_towards(address, 29500) == address
            assert interface_towards(address, 29500) == name
