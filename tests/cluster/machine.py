"""A machine for a real node, made of namespaces: what a node changes on a machine, it changes on this one.

It owns the namespaces (mounts, network, processes), the link to this host, and the cgroup; it must not know Kubernetes.

Mounts, bridges, nft tables, network sysctls and processes end with the namespaces, however their owner ends. Only a
cgroup outlives them; its name says whose it is, and the next machine removes those whose owner is gone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from posttrain.local.container import ProcessId
from posttrain.local.shim import start_ticks
from tests.cluster import machine_init
from tests.cluster.errors import ClusterError
from tests.cluster.processes import Process, poll
from tests.cluster.requirements import find_program

# What the kubelet would write, which no namespace keeps apart: it finds it there and leaves it.
_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
_COUNT = 256
_CGROUP_PREFIX = "posttrain-test"
_CGROUP_SECONDS = 20.0


class Machine:
    """Namespaces with a network link to this host, and the way to run something in them."""

    def __init__(self, folder: Path, *, hostname: str) -> None:
        self.folder = folder
        self._hostname = hostname
        self._name, number = _take_number()
        self._interface = f"posttrain{number}"
        link = IPv4Network(f"10.254.{number}.0/30")
        self._prefix = link.prefixlen
        self.host_address, self.address = map(str, link.hosts())
        self.pod_network = f"10.253.{number}.0/24"
        self.cgroup = f"{_CGROUP_PREFIX}-{os.getpid()}-{start_ticks(os.getpid())}-{number}"
        ready = folder / "ready"
        self.init = Process(
            "machine",
            [
                *("unshare", "--mount", "--net", "--pid", "--uts", "--propagation=private", "--fork"),
                "--kill-child=SIGKILL",
                *(sys.executable, "-I", "-S", machine_init.__file__, json.dumps(self._mounts()), ready),
            ],
            folder=folder.parent,
            ready=ready.exists,
            forks=True,
        )

    def start(self) -> None:
        """Make the namespaces and the link.

        Raises:
            ClusterError: a mount or an address was refused; the message has what the command wrote.
        """
        remove_stale_cgroups()
        _make_cgroup(self.cgroup)
        self.init.start()
        ip = str(find_program("ip"))
        pid = str(self.init.pid)
        _run(ip, "link", "add", self._interface, "type", "veth", "peer", "name", "eth0", "netns", pid)
        _run(ip, "address", "add", f"{self.host_address}/{self._prefix}", "dev", self._interface)
        _run(ip, "link", "set", self._interface, "up")
        self.run(ip, "address", "add", f"{self.address}/{self._prefix}", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self.run(ip, "link", "set", interface, "up")
        self.run(ip, "route", "add", "default", "via", self.host_address)
        _run(ip, "route", "add", self.pod_network, "via", self.address)

    def close(self) -> None:
        """End everything on it, and remove its cgroup."""
        self.init.stop()
        _remove_cgroup(self.cgroup)
        self._name.close()

    def process(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        ready: Callable[[], bool] = lambda: True,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Return a process of this machine, which is not started yet."""
        return Process(name, [*self._enter(), *argv], folder=self.folder.parent, ready=ready, env=env, forks=True)

    def run(self, *argv: str | Path) -> str:
        """Run a command on it, and return what it prints.

        Raises:
            ClusterError: it failed; the message has what it wrote on standard error.
        """
        return _run(*self._enter(), *argv)

    def answers(self, *argv: str | Path) -> bool:
        """Return whether a command on it succeeds."""
        try:
            self.run(*argv)
        except ClusterError:
            return False
        return True

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.init.pid), "--mount", "--net", "--pid", "--uts", "--"]

    def _mounts(self) -> list[list[str]]:
        """Return the commands that make what a node writes its own."""
        log, state, work, sysctls = (self.folder / name for name in ("log", "var-lib", "var-lib-work", "sysctls"))
        for made in (log, state, work):
            made.mkdir(parents=True)
        commands = [["mount", "-t", "proc", "proc", "/proc"]]
        for name, value in _SYSCTLS.items():
            file = sysctls / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
            commands.append(["mount", "--bind", str(file), f"/proc/sys/{name}"])
        layers = f"lowerdir=/var/lib,upperdir={state},workdir={work}"
        return [
            *commands,
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
            ["mount", "--bind", str(log), "/var/log"],
            ["mount", "-t", "overlay", "overlay", "-o", layers, "/var/lib"],
            ["mount", "--make-rshared", "/"],
            ["hostname", self._hostname],
            ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"],
        ]


def remove_stale_cgroups() -> None:
    """Remove the cgroups of machines whose owner is gone, and end what is left in them.

    Raises:
        ClusterError: something in one does not end.
    """
    found = {path.name for root in _cgroup_roots() for path in root.glob(f"{_CGROUP_PREFIX}-*-*-*")}
    for name in found:
        pid, ticks = name.removeprefix(f"{_CGROUP_PREFIX}-").split("-")[:2]
        if not ProcessId(pid=int(pid), start_ticks=int(ticks)).is_alive():
            _remove_cgroup(name)


def _make_cgroup(name: str) -> None:
    for root in _cgroup_roots():
        (root / name).mkdir(exist_ok=True)
        # Version 2: the kubelet wants every controller that the root has.
        delegated = root / "cgroup.subtree_control"
        if delegated.exists():
            missing = set((root / "cgroup.controllers").read_text().split()) - set(delegated.read_text().split())
            for controller in missing:
                with suppress(OSError):
                    delegated.write_text(f"+{controller}")


def _remove_cgroup(name: str) -> None:
    def removed() -> bool:
        left = [root / name for root in _cgroup_roots() if (root / name).exists()]
        for folder in left:
            # Deepest first; a group goes when the last process in it is gone.
            for group in sorted((folder, *(path for path in folder.rglob("*") if path.is_dir())), reverse=True):
                _end_processes(group / "cgroup.procs")
                with suppress(OSError):
                    group.rmdir()
        return not any(folder.exists() for folder in left)

    poll(removed, what=f"the cgroup {name} to be empty", seconds=_CGROUP_SECONDS)


def _end_processes(procs: Path) -> None:
    with suppress(OSError):
        for pid in procs.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _cgroup_roots() -> list[Path]:
    """Return where groups are made: every hierarchy, of version 1 and of version 2."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(folder) for folder, kind in mounts if kind in {"cgroup", "cgroup2"}]


def _take_number() -> tuple[socket.socket, int]:
    routes: list[dict[str, Any]] = json.loads(_run(str(find_program("ip")), "-json", "-4", "route", "show"))
    used = [IPv4Network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    for number in random.sample(range(_COUNT), _COUNT):
        networks = (IPv4Network(f"10.254.{number}.0/30"), IPv4Network(f"10.253.{number}.0/24"))
        if any(network.overlaps(other) for network in networks for other in used):
            continue
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            name.bind(f"\0posttrain-test-machine-{number}")
        except OSError:
            name.close()
        else:
            return name, number
    raise ClusterError("no network between 10.253.0.0/24 and 10.254.255.0/30 is free on this machine")


def _run(*argv: str | Path) -> str:
    ran = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise ClusterError(f"`{' '.join(map(str, argv))}`: exit code {ran.returncode}\n{ran.stderr}{ran.stdout}")
    return ran.stdout
