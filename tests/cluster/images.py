"""Container images for a real node, built without an engine: archives in the cache, under their content hash.

It owns building; it must not know the node that gets them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from posttrain.local.environments import cache_root
from tests.cluster.errors import ClusterError
from tests.cluster.requirements import BUSYBOX as BUSYBOX_PROGRAM
from tests.cluster.requirements import find_program

REGISTRY = "registry.test"
"""A name that resolves nowhere: an image is there, or a pod says that it is not."""
PAUSE = f"{REGISTRY}/pause:1"
BUSYBOX = f"{REGISTRY}/busybox:1"
_PAUSE_FILE = """\
FROM scratch
COPY busybox /bin/busybox
ENTRYPOINT ["/bin/busybox", "sleep", "infinity"]
"""
_BUSYBOX_FILE = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "mkdir", "-p", "/etc", "/root", "/sbin", "/tmp", "/usr/bin", "/usr/sbin", "/var"]
RUN ["/bin/busybox", "--install", "-s"]
RUN ["/bin/sh", "-c", "echo root:x:0:0:root:/root:/bin/sh > /etc/passwd && /bin/chmod 1777 /tmp"]
ENV PATH=/bin:/sbin:/usr/bin:/usr/sbin
CMD ["/bin/sh"]
"""


def build_image(context: Path, tag: str, *, dockerfile: Path | None = None, bases: Sequence[Path] = ()) -> Path:
    """Return an archive of the image that a Dockerfile makes of a folder; it is built unless the cache has it.

    `dockerfile` is the folder's own unless it is given. `bases` are archives of images that its FROM lines name; no
    other image can be had.

    Raises:
        ClusterError: buildah failed; the message has what it wrote.
    """
    file = dockerfile or context / "Dockerfile"
    folder = cache_root().absolute() / "cluster" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    name = tag.rpartition("/")[2].replace(":", "-")
    archive = folder / f"{name}-{_digest(context, tag, file, bases)}.tar"
    with _locked(archive.with_suffix(".lock")):
        if not archive.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"{archive.stem}.", suffix=".tmp") as making:
                made = Path(making) / "image.tar"
                _build(context, tag, file, bases, made=made, storage=Path(making))
                made.rename(archive)
    return archive


def build_base_images() -> tuple[Path, ...]:
    """Return archives of the two images that every node has: `pause`, and a `busybox` with its shell.

    Errors as `build_image`.
    """
    with tempfile.TemporaryDirectory() as made:
        context = Path(made)
        shutil.copy(BUSYBOX_PROGRAM, context / "busybox")
        archives = []
        for tag, text in ((PAUSE, _PAUSE_FILE), (BUSYBOX, _BUSYBOX_FILE)):
            (context / "Dockerfile").write_text(text)
            archives.append(build_image(context, tag))
    return tuple(archives)


def _build(context: Path, tag: str, file: Path, bases: Sequence[Path], *, made: Path, storage: Path) -> None:
    policy = storage / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    # In a storage of its own, without a mount that would have to be undone.
    buildah = [
        str(find_program("buildah")),
        *("--root", str(storage / "root"), "--runroot", str(storage / "run"), "--storage-driver", "vfs"),
    ]
    signatures = ("--signature-policy", str(policy))
    for base in bases:
        _run([*buildah, "pull", "--quiet", *signatures, f"docker-archive:{base}"])
    _run(
        [
            *(*buildah, "build", "--quiet", "--isolation", "chroot", "--pull-never", *signatures),
            *("--tag", tag, "--file", str(file), str(context)),
        ]
    )
    _run([*buildah, "push", "--quiet", *signatures, tag, f"docker-archive:{made}:{tag}"])


def _run(argv: Sequence[str]) -> None:
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise ClusterError(f"`{' '.join(argv)}`: exit code {ran.returncode}\n{ran.stderr}{ran.stdout}")


def _digest(context: Path, tag: str, file: Path, bases: Sequence[Path]) -> str:
    digest = hashlib.sha256(json.dumps([tag, [base.name for base in bases]]).encode())
    digest.update(file.read_bytes())
    for path in sorted(path for path in context.rglob("*") if path != file):
        digest.update(f"\0{path.relative_to(context)}\0{path.lstat().st_mode}\0".encode())
        if path.is_symlink():
            digest.update(bytes(path.readlink()))
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
