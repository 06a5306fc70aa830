"""What programs may change on the host of a test, to be compared before and after."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def observe_host() -> dict[str, Any]:
    """Return what a kubelet, kube-proxy or a CNI plugin would change on this host, without our own network links."""

    def lines(*argv: str) -> list[str]:
        return sorted(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines())

    sysctls = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")
    folders = ("/var/lib/kubelet", "/var/lib/cni", "/var/log/containers", "/var/log/pods", "/run/containerd")
    return {
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in sysctls},
        "folders": [folder for folder in folders if Path(folder).exists()],
        "links": [line.split()[0] for line in lines("ip", "-brief", "link") if not line.startswith("posttrain")],
        "nftables": lines("nft", "list", "tables"),
    }
