"""Ports for tests in which a program is told one and opens it itself."""

import socket


def free_port() -> int:
    """One that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
