"""Read a hostfile in the format of DeepSpeed and MPI: one machine per line, `worker-0 slots=8`.

Responsible for: reading it, and naming the file and line of a mistake. Not responsible for: reaching the
machines.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dovetail.errors import ConfigError
from dovetail.text_file import read_text

_LINE = re.compile(r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?)\s+slots=(?P<slots>[0-9]+)")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of a hostfile; `slots` is the number of processes it takes, one per GPU."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """Read the machines in their order; `#` begins a comment. Raises ConfigError that names file and line."""
    try:
        lines = read_text(Path(path)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile {path}: cannot be read: {error}", hint="write one machine per line: worker-0 slots=8"
        ) from error
    hosts: dict[str, Host] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _host(text, f"{path} line {number}")
        if host.name in hosts:
            raise ConfigError(
                f"{path} line {number}: {host.name} is already in line {line_of[host.name]}",
                hint="give each machine one line with all its slots",
            )
        hosts[host.name], line_of[host.name] = host, number
    if not hosts:
        raise ConfigError(
            f"{path}: the file names no machine", hint="write one machine per line: worker-0 slots=8"
        )
    return list(hosts.values())


def _host(text: str, where: str) -> Host:
    found = _LINE.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{where}: {text!r} is not a machine and its slots", hint="write it as: worker-0 slots=8"
        )
    host = Host(found["name"], int(found["slots"]))
    if host.slots < 1:
        raise ConfigError(
            f"{where}: {host.name} has {host.slots} slots",
            hint="give the number of its GPUs, or leave out the line",
        )
    return host
