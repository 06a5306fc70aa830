"""What a real node needs of the machine that it runs on.

It owns the list of programs and packages; it must not install anything.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CNI_FOLDER = Path("/usr/lib/cni")
BUSYBOX = Path("/bin/busybox")
# Program or file to the Debian package that has it.
_NEEDED = {
    "runc": "runc",
    "buildah": "buildah",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    str(CNI_FOLDER / "bridge"): "containernetworking-plugins",
    str(BUSYBOX): "busybox-static",
}
_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def find_program(name: str) -> str | None:
    """Return where a program lies; the administrator's folders are searched, too."""
    return shutil.which(name, path=_SEARCHED)


def why_no_node() -> str | None:
    """Return why no real node can run here, or None if one can."""
    if os.geteuid() != 0:
        return "a real node needs root"
    if missing := missing_packages():
        return f"missing packages (make cluster-packages, or apt-get install {' '.join(missing)})"
    return None


def missing_packages() -> list[str]:
    """Return the Debian packages that a real node needs and that are not installed."""
    return sorted({package for name, package in _NEEDED.items() if not _is_there(name)})


def _is_there(name: str) -> bool:
    if name == str(BUSYBOX):
        # A dynamic one finds no loader in an image that has nothing else.
        return BUSYBOX.is_file() and b"/ld-linux" not in BUSYBOX.read_bytes()[:4096]
    return find_program(name) is not None
