"""What processes of this machine listen on, as the kernel tells it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"


class Listener(NamedTuple):
    """A TCP socket that takes connections, and the name and id of its process."""

    process: str
    pid: int
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def listeners_of(pid: int) -> list[Listener]:
    """The listening sockets of a process and its descendants."""
    sockets = dict(_listening_sockets())
    found = []
    for member in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):  # it has ended
            name = Path(f"/proc/{member}/comm").read_text().strip()
            for link in Path(f"/proc/{member}/fd").iterdir():
                with contextlib.suppress(OSError):
                    place = sockets.get(os.readlink(link))
                    if place is not None:
                        found.append(Listener(name, member, *place))
    return found


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, unseen = [], [pid]
    while unseen:
        unseen += children.get(unseen.pop(), [])
        found = list(dict.fromkeys([*found, *unseen]))
    return found


def _listening_sockets() -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the sockets as `/proc/PID/fd` names them, each with address and port."""
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            words = line.split()
            if words[3] == _LISTEN:
                host, port = words[1].split(":")
                words_of_host = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                address = str(ipaddress.ip_address(b"".join(words_of_host)))
                yield f"socket:[{words[9]}]", (address, int(port, 16))
