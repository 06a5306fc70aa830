"""What this machine has, and the settings that describe it as a cluster of one node.

It owns the look at CPUs, memory and GPUs; it must not decide whether a run fits.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.settings import Profile, Settings

_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = "max"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU; `device` is its name in CUDA_VISIBLE_DEVICES."""

    device: str
    name: str
    memory_mib: int | None
    """None where it shares the machine's memory."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What processes of ours may use."""

    name: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    system: str = "Linux"
    """As `uname` names it: Darwin is macOS."""


def observe_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Return what this machine has: within the affinity and the cgroup of this process, and CUDA_VISIBLE_DEVICES."""
    return Machine(
        name=platform.node() or "localhost",
        cpus=_cpus(),
        memory_bytes=_memory_bytes(),
        gpus=visible_gpus(_list_gpus(), visible=environ.get("CUDA_VISIBLE_DEVICES")),
        system=platform.system(),
    )


def has_nvidia_driver() -> bool:
    """Return whether NVIDIA's driver finds a GPU here, also one that CUDA_VISIBLE_DEVICES hides."""
    return bool(_list_gpus())


def local_settings(machine: Machine, *, profile: str | None = None, num_nodes: int = 1) -> Settings:
    """Return the settings of a local run. Every profile is this machine, also the `profile` that a run names.

    The nodes of a gang share the CPUs.
    """
    memory = min((gpu.memory_mib for gpu in machine.gpus if gpu.memory_mib is not None), default=None)
    own = Profile(
        gpu_name=machine.gpus[0].name if machine.gpus else None,
        gpu_memory=f"{memory}Mi" if memory is not None else None,
        cpu=str(max(machine.cpus // num_nodes, 1)),
        memory=str(machine.memory_bytes),
    )
    return Settings(
        profiles={name: own for name in ("default", profile) if name is not None},
        allow_file_sources=True,
        queues=False,
        # On 127.0.0.1 the machine's own users reach them, who could as well end them.
        open_rollout_servers=True,
        prepare_cpu=str(machine.cpus),
        prepare_memory=str(machine.memory_bytes),
    )


def visible_gpus(gpus: tuple[Gpu, ...], *, visible: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order: indices or the beginnings of UUIDs.

    As CUDA does, the list ends at the first entry that names no GPU.
    """
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.isdecimal() and int(entry) < len(gpus):
            gpu: Gpu | None = gpus[int(entry)]
        else:
            gpu = next((gpu for gpu in gpus if gpu.device.startswith(entry)), None)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return tuple(chosen)


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """Return the GPUs in what `nvidia-smi --query-gpu=uuid,name,memory.total --format=csv,noheader,nounits` prints."""
    rows = csv.reader(listing.splitlines(), skipinitialspace=True)
    return tuple(
        Gpu(device=uuid, name=name, memory_mib=int(memory) if memory.isdecimal() else None)
        for uuid, name, memory in rows
    )


def _list_gpus() -> tuple[Gpu, ...]:
    query = shutil.which("nvidia-smi")
    if query is None:
        return ()
    answer = subprocess.run(
        [query, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    # Without a driver, or with one that does not match, there are no GPUs to use.
    return parse_gpus(answer.stdout) if answer.returncode == 0 else ()


def _cpus() -> int:
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        cpus = os.cpu_count() or 1
    quotas = [int(quota) / int(period) for quota, period in map(str.split, _limits("cpu.max")) if quota != _NO_LIMIT]
    return max(min([cpus, *(int(quota) for quota in quotas)]), 1)


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(limit) for limit in _limits("memory.max") if limit != _NO_LIMIT)])


def _limits(file: str) -> list[str]:
    """Return the content of a limit's file in our cgroup and in every one above it (cgroup v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    folder = _CGROUPS / own
    files = [place / file for place in (folder, *folder.parents) if place.is_relative_to(_CGROUPS)]
    return [limit.read_text().strip() for limit in files if limit.is_file()]
