"""The product's images for a real node: the operator's from its own Dockerfile, the trainer's without its gigabytes.

It owns how both are built on the test base image, cached under their content hash; it must not know what runs in them.

The trainer's libraries are five gigabytes: they are not in its image here, but this machine's environment of them, made
from the same lock, is mounted into every container of the node.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from posttrain.local.environments import cache_root
from tests.cluster.base_image import ensure_base_image
from tests.cluster.errors import ClusterError
from tests.cluster.images import REGISTRY, build_image
from tests.cluster.requirements import find_program

ROOT = Path(__file__).resolve().parents[2]
TRAINER = f"{REGISTRY}/trainer:1"
OPERATOR_REPOSITORY = f"{REGISTRY}/operator"
TRAINER_LIBRARIES = "/opt/trainer-libraries"
_PACKAGES = {
    "posttrain": ROOT / "operator" / "posttrain",
    "posttrain_workloads": ROOT / "workloads" / "posttrain_workloads",
}
_TRAINER_FILE = """\
FROM docker-archive:{base}
COPY posttrain /opt/posttrain/posttrain
COPY posttrain_workloads /opt/posttrain/posttrain_workloads
COPY python /usr/local/bin/python
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
"""
_PYTHON = f"""\
#!/bin/sh
PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}/opt/posttrain:{TRAINER_LIBRARIES}" exec python3 "$@"
"""
# pip in the build asks the package index as this machine does.
_OF_THIS_MACHINE = ("/etc/ssl/certs", "/etc/pip.conf")


def base_archive() -> Path:
    """Return the archive of the base image."""
    return ensure_base_image(cache=cache_root().absolute(), report=lambda line: print(line, file=sys.stderr))


def build_trainer_image() -> Path:
    """Return an archive of the trainer's image.

    Raises:
        ClusterError: buildah failed; the message has what it wrote.
    """
    with tempfile.TemporaryDirectory() as made:
        context = Path(made)
        for name, source in _PACKAGES.items():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        python = context / "python"
        python.write_text(_PYTHON)
        python.chmod(0o755)
        (context / "Dockerfile").write_text(_TRAINER_FILE.format(base=base_archive()))
        return build_image(context, TRAINER)


def build_operator_image(tag: str = "1") -> Path:
    """Return an archive of the operator's image, built as its Dockerfile says. Errors as `build_trainer_image`."""
    base = base_archive()
    lock, dockerfile = ROOT / "images/operator/requirements.txt", ROOT / "images/operator/Dockerfile"
    sources = sorted(file for folder in _PACKAGES.values() for file in folder.rglob("*") if file.suffix != ".pyc")
    digest = hashlib.sha256(f"{base.name} {tag}".encode())
    for file in (lock, dockerfile, ROOT / "pyproject.toml", *(file for file in sources if file.is_file())):
        digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    archive = cache_root().absolute() / "cluster" / "images" / f"operator-{digest.hexdigest()[:16]}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f"{archive.stem}.", suffix=".tmp") as making:
            made = Path(making) / "image.tar"
            _build_operator(Path(making), base=base, image=f"{OPERATOR_REPOSITORY}:{tag}", made=made)
            made.rename(archive)
    return archive


def _build_operator(folder: Path, *, base: Path, image: str, made: Path) -> None:
    context = folder / "context"
    (context / "images" / "operator").mkdir(parents=True)
    for part in ("Dockerfile", "requirements.txt"):
        shutil.copy(ROOT / "images" / "operator" / part, context / "images" / "operator")
    uv = Path(sys.executable).with_name("uv")
    _run([uv, "build", "--quiet", "--wheel", "--out-dir", context / "dist", ROOT])
    storage = ("--root", folder / "root", "--runroot", folder / "run", "--storage-driver", "vfs")
    volumes = [f"--volume={path}:{path}:ro" for path in _OF_THIS_MACHINE if Path(path).exists()]
    buildah = find_program("buildah")
    _run(
        [
            *(buildah, *storage, "build", "--quiet", "--isolation", "chroot", *volumes),
            *("--build-arg", f"BASE=docker-archive:{base}", "--tag", image),
            *("--file", context / "images" / "operator" / "Dockerfile", context),
        ]
    )
    _run([buildah, *storage, "push", "--quiet", image, f"docker-archive:{made}:{image}"])


def _run(argv: list[str | Path]) -> None:
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise ClusterError(f"`{' '.join(map(str, argv))}`: exit code {ran.returncode}\n{ran.stderr}{ran.stdout}")
