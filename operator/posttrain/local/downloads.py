"""How much is downloaded for an environment, from the lock alone.

It owns which files of a lock this interpreter takes; it must not ask an index, nor look into uv's cache.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """What an environment is installed from; `bytes` is the sum of the files, none of them in any cache."""

    packages: int
    bytes: int

    def __str__(self) -> str:
        amount = f"{self.bytes / 1e9:.1f} GB" if self.bytes >= 1e9 else f"{self.bytes / 1e6:.0f} MB"
        packages = "1 package" if self.packages == 1 else f"{self.packages} packages"
        return f"{packages}, about {amount} to download where uv's cache holds none of them"


def measure_downloads(requirements: str, *, resolution: str) -> Downloads:
    """Return what the installation of `requirements` downloads, on this machine and for this interpreter.

    `requirements` has lines as uv exports them, each a pinned package with its marker, and `resolution` is the uv.lock
    that they come from. Of a package it is the wheel that fits best, as for uv, and where none fits the source.

    Raises:
        KeyError: a package is not in the lock with its version: the two are not of each other.
    """
    locked = {(package["name"], package["version"]): package for package in _packages(resolution)}
    ranks = {tag: rank for rank, tag in enumerate(sys_tags())}
    sizes = [_size(locked[name, version], ranks=ranks) for name, version in _needed(requirements)]
    return Downloads(packages=len(sizes), bytes=sum(sizes))


def _packages(resolution: str) -> Iterator[Mapping[str, Any]]:
    yield from (package for package in tomllib.loads(resolution)["package"] if "version" in package)


def _needed(requirements: str) -> Iterator[tuple[str, str]]:
    """Yield name and version of each package whose marker holds here; options and hashes are passed over."""
    for line in requirements.splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.split(" --hash=")[0].removesuffix("\\").strip())
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement.name, str(requirement.specifier).removeprefix("==")


def _size(package: Mapping[str, Any], *, ranks: Mapping[Tag, int]) -> int:
    fitting = [
        (rank, int(wheel["size"]))
        for wheel in package.get("wheels", ())
        if (rank := _rank(wheel["url"].rpartition("/")[2], ranks=ranks)) is not None
    ]
    return min(fitting)[1] if fitting else int(package["sdist"]["size"])


def _rank(wheel: str, *, ranks: Mapping[Tag, int]) -> int | None:
    """Return how well a wheel fits, 0 best; None where it does not."""
    tags: Iterable[Tag] = parse_wheel_filename(wheel)[3]
    return min((ranks[tag] for tag in tags if tag in ranks), default=None)
