"""Makes the base of the test images from this machine's Debian packages: no registry, no container engine, no root.

    python -m tests.cluster.base_image    # prints where the archive lies

It owns a small stand-in for `python:3.11-slim`, as an archive that `FROM docker-archive:FILE` reads; it must not know
what is built on it. The packages' own scripts are not run: what an image needs of them stands in `_FILES`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from posttrain.local.environments import cache_root

PACKAGES = ("python3-venv", "coreutils", "dash", "base-files", "libstdc++6")
"""What `RUN`, `python3 -m venv` and compiled wheels need; apt adds what these depend on."""

_FOLDERS = {"tmp": 0o1777, "etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "root": 0o700}
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Top folders that are links into /usr, as on every Debian since 12, whatever a package's files are called."""
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}
_LEFT_OUT = ("usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/lintian/")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class BaseImageError(Exception):
    """The base image cannot be made here; the message says why."""


def ensure_base_image(*, cache: Path, report: Callable[[str], None]) -> Path:
    """Return the archive of the base image, which is made first if this machine's packages are newer.

    Raises:
        BaseImageError: apt does not know the packages, or cannot load one.
    """
    plan = _apt("--print-uris", archives=cache)
    recipe = hashlib.sha256(plan.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    archive = cache / "cluster" / f"base-image-{recipe}.tar"
    if archive.exists():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may make it at once: the same bytes, and each appears by one rename.
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f"{archive.stem}.", suffix=".tmp") as making:
        debs, layer, made = Path(making) / "debs", Path(making) / "layer.tar", Path(making) / archive.name
        (debs / "partial").mkdir(parents=True)
        _apt("--download-only", archives=debs)
        found = sorted(debs.glob("*.deb"))
        _write_layer(layer, debs=found)
        _write_archive(made, layer=layer)
        made.rename(archive)
    report(f"made a base image of {len(found)} Debian packages: {archive.stat().st_size / 2**20:.0f} MiB")
    return archive


def _apt(what: str, *, archives: Path) -> str:
    """Ask apt for the packages and all that they need, as on a machine that has none."""
    options = (f"Dir::Cache::archives={archives}", "APT::Install-Recommends=false", "Debug::NoLocking=true")
    with tempfile.NamedTemporaryFile(suffix=".status") as nothing_installed:
        command = ["apt-get", "--quiet", "--yes", what, "--option", f"Dir::State::status={nothing_installed.name}"]
        for option in options:
            command += ["--option", option]
        try:
            done = subprocess.run([*command, "install", *PACKAGES], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise BaseImageError("the base image is made of Debian packages, and there is no apt-get here") from None
        except subprocess.CalledProcessError as error:
            raise BaseImageError(f"apt-get: {error.stderr.strip()}: try `apt-get update` first") from None
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("'"))


def _write_layer(file: Path, *, debs: Sequence[Path]) -> None:
    """Write the file system that the packages consist of."""
    written: set[str] = set()
    with tarfile.open(file, "w") as layer:
        for entry, content in _own_entries():
            written.add(entry.name)
            layer.addfile(entry, content)
        for deb in debs:
            with (
                subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpacking,
                tarfile.open(fileobj=unpacking.stdout, mode="r|") as package,
            ):
                for entry in package:
                    entry.name = _placed(entry.name)
                    if entry.islnk():
                        entry.linkname = _placed(entry.linkname)
                    if entry.name in written or entry.name.startswith(_LEFT_OUT):
                        continue
                    written.add(entry.name)
                    layer.addfile(entry, package.extractfile(entry) if entry.isfile() else None)
            if unpacking.returncode:
                raise BaseImageError(f"dpkg-deb cannot read {deb.name}")


def _placed(name: str) -> str:
    path = name.removeprefix("./").strip("/")
    return f"usr/{path}" if path.partition("/")[0] in _MERGED else path or "."


def _own_entries() -> Iterator[tuple[tarfile.TarInfo, io.BytesIO | None]]:
    for name, mode in _FOLDERS.items():
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        yield entry, None
    for name in _MERGED:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
        yield entry, None
    for name, text in _FILES.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        yield entry, io.BytesIO(text.encode())


def _write_archive(file: Path, *, layer: Path) -> None:
    """Write a layer as an image, in the form that `docker save` has."""
    with layer.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"], "Cmd": ["python3"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": None, "Layers": ["layer.tar"]}]
    with tarfile.open(file, "w") as archive:
        for name, data in (("manifest.json", manifest), ("config.json", config)):
            text = json.dumps(data).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        archive.add(layer, "layer.tar")


if __name__ == "__main__":
    print(ensure_base_image(cache=cache_root(os.environ), report=lambda line: print(line, file=sys.stderr)))
