"""The base of the test images, made of this machine's Debian packages."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from posttrain.local.environments import cache_root
from tests.cluster.base_image import BaseImageError, ensure_base_image


@pytest.fixture(scope="module")
def archive() -> Path:
    if shutil.which("apt-get") is None:
        pytest.skip("the base image is made of Debian packages, and there is no apt-get here")
    try:
        return ensure_base_image(cache=cache_root(os.environ), report=print)
    except BaseImageError as error:
        pytest.skip(str(error))


def test_it_is_one_layer_with_a_python_and_a_shell(archive: Path) -> None:
    with tarfile.open(archive) as image:
        (entry,) = json.load(image.extractfile("manifest.json"))
        config = json.load(image.extractfile(entry["Config"]))
        assert entry["Layers"] == ["layer.tar"]
        assert len(config["rootfs"]["diff_ids"]) == 1
        with tarfile.open(fileobj=io.BytesIO(image.extractfile("layer.tar").read())) as layer:
            names = layer.getnames()
            assert layer.getmember("bin").linkname == "usr/bin"
            assert layer.getmember("usr/bin/sh").linkname == "dash"
            assert layer.getmember("tmp").mode == 0o1777

    assert "usr/bin/python3" in names
    assert any(name.endswith("/ensurepip/__init__.py") for name in names)
    assert len(names) == len(set(names))
    assert not any(name.startswith(("bin/", "lib/", "usr/share/doc/")) for name in names)


def test_it_is_made_once_for_the_same_packages(archive: Path) -> None:
    lines: list[str] = []

    assert ensure_base_image(cache=cache_root(os.environ), report=lines.append) == archive
    assert lines == []
