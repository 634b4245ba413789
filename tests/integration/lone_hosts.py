"""Hosts that a cluster can be made of, on this machine: each has its own processes, network, home and ssh.

`ray stop`, `ray down` and the ports of a cluster reach nothing outside them, so a real `ray up` can run
beside other Rays of this machine. They are Linux namespaces, which need root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from debian_packages import install

PROGRAMS = {
    "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2", "pgrep": "procps",
}  # fmt: skip
"""What the hosts need, with the Debian packages that have it."""

_START = """
set -e
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/tmp_ray /tmp/ray
mount --bind {folder}/home {home}
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd_config
"""

_SSHD_CONFIG = """
HostKey {keys}/host_key
AuthorizedKeysFile {keys}/key.pub
PermitRootLogin yes
PidFile none
StrictModes no
UsePAM no
"""


class NoHostsError(Exception):
    """Why this machine cannot have such hosts."""


class LoneHost:
    """One host: its address among all of them, and its home as it is called there and as seen from here."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.home = folder / "home"
        self.home_from_here = folder / name / "home"
        self._folder = folder / name
        for path in (self.home, self.home_from_here, self._folder / "tmp_ray"):
            path.mkdir(parents=True, exist_ok=True)
        others = Path("/etc/passwd").read_text().splitlines(keepends=True)
        users = [
            f"root:x:0:0:root:{self.home}:/bin/bash\n",
            *(u for u in others if not u.startswith("root:")),
        ]
        (self._folder / "passwd").write_text("".join(users))
        (self._folder / "sshd_config").write_text(_SSHD_CONFIG.format(keys=folder))
        sshd = shutil.which("sshd", path=_system_path())
        script = _START.format(folder=self._folder, home=self.home, sshd=sshd)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--mount", "--net",
                 "--mount-proc", "--kill-child", "--", "sh", "-c", script],
                stdout=log, stderr=log,
            )  # fmt: skip
        self.pid = self._find_child()

    @property
    def _log(self) -> Path:
        return self._folder / "sshd.log"

    def _find_child(self) -> int:
        for _ in range(100):
            found = subprocess.run(
                ["pgrep", "--parent", str(self._process.pid)], capture_output=True, text=True, check=False
            ).stdout.split()
            if found and "listening" in self._log.read_text():
                return int(found[0])
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        self.close()
        raise NoHostsError(f"no host of its own: {self._log.read_text().strip()}")

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command, to be run on this host rather than here."""
        enter = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--net", "--"]
        return [*enter, "env", f"HOME={self.home}", *command]

    def run(self, command: Sequence[str]) -> str:
        done = subprocess.run(self.inside(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def processes(self, name: str) -> list[int]:
        """The ids, as this host has them, of the processes whose command line holds `name`."""
        found = subprocess.run(
            self.inside(["pgrep", "--full", name]), capture_output=True, text=True, check=False
        ).stdout
        return [int(word) for word in found.split()]

    def close(self) -> None:
        """End the host and every process of it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def lone_hosts(folder: Path, names: Sequence[str]) -> Iterator[list[LoneHost]]:
    """Hosts of these names in one network: 10.0.0.1, with a wire to each of the others.

    Raises NoHostsError where this machine does not let us.
    """
    _install_programs()
    folder.mkdir(parents=True)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    for path in ("/run/sshd", "/tmp/ray"):
        Path(path).mkdir(exist_ok=True)
    hosts: list[LoneHost] = []
    try:
        for number, name in enumerate(names, start=1):
            hosts.append(LoneHost(folder, name, f"10.0.0.{number}"))
        for host in hosts[1:]:
            _connect(hosts[0], host)
        yield hosts
    finally:
        for host in hosts:
            host.close()


def _install_programs() -> None:
    if os.geteuid() != 0:
        raise NoHostsError("hosts of their own need root")
    for program in ("unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            raise NoHostsError(f"there is no {program} here")
    missing = [
        package for program, package in PROGRAMS.items() if shutil.which(program, path=_system_path()) is None
    ]
    if not missing:
        return
    if complaint := install(missing):
        raise NoHostsError(f"{', '.join(missing)} are missing: {complaint}")


def _system_path() -> str:
    return f"/usr/sbin:/sbin:{os.environ['PATH']}"


def _connect(center: LoneHost, host: LoneHost) -> None:
    """Lay a wire between two hosts; each sends whatever it has no other way for along its last wire."""
    end = f"to_{host.name}"
    made = _in_network(
        center, ["link", "add", "name", end, "type", "veth", "peer", "name", "wire", "netns", str(host.pid)]
    )
    if made.returncode != 0:
        raise NoHostsError(f"no network of its own: {made.stderr.strip()}")
    for side, other, device in ((center, host, end), (host, center, "wire")):
        for arguments in (
            ["address", "add", f"{side.address}/32", "dev", device],
            ["link", "set", device, "up"],
            ["route", "add", f"{other.address}/32", "dev", device],
            ["route", "replace", "default", "via", other.address, "dev", device],
        ):
            done = _in_network(side, arguments)
            assert done.returncode == 0, done.stderr


def _in_network(host: LoneHost, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `ip` in the host's network with the process ids of this machine."""
    return subprocess.run(
        ["nsenter", "--target", str(host.pid), "--net", "--", "ip", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
