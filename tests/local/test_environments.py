"""An image's environment is made once, from its lock alone, whoever asks for it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.local.environments import COMPLETE_MARKER, cache_root, ensure_environment, find_lock, images_root

REPOSITORY = Path(__file__).parents[2]
METADATA_ONLY = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "large"
version = "1.0+cpu"
"""
BACKEND = """\
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = "large-1.0+cpu.dist-info"
    with zipfile.ZipFile(f"{folder}/large-1.0+cpu-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: large\\nVersion: 1.0+cpu\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
    return "large-1.0+cpu-py3-none-any.whl"
"""


def build_wheel(folder: Path, *, name: str, module: str) -> Path:
    """Make a wheel with one module, without any index or build backend."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


def write_lock(images: Path, *, name: str, wheel: Path, digest: str | None = None) -> None:
    """Write an image's requirements with that wheel in it."""
    (images / name).mkdir(parents=True)
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    lines = ["--no-index", f"--find-links {wheel.parent}", f"tiny==1.0 --hash=sha256:{digest}"]
    (images / name / "requirements.txt").write_text("\n".join(lines) + "\n")
    (images / name / "uv.lock").write_text(
        '[[package]]\nname = "tiny"\nversion = "1.0"\n'
        f'wheels = [{{ url = "https://example.com/{wheel.name}", size = {wheel.stat().st_size} }}]\n'
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one image, `small`."""
    wheel = build_wheel(tmp_path / "wheels", name="tiny", module="ANSWER = 42\n")
    write_lock(tmp_path / "images", name="small", wheel=wheel)
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def uv_cache(tmp_path: Path) -> Iterator[None]:
    """Keep uv's own cache out of the test: a wheel of the same name would be taken from it."""
    before = os.environ.get("UV_CACHE_DIR")
    os.environ["UV_CACHE_DIR"] = str(tmp_path / "uv-cache")
    yield
    os.environ.pop("UV_CACHE_DIR")
    if before is not None:
        os.environ["UV_CACHE_DIR"] = before


def run(interpreter: Path, program: str) -> str:
    return subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_has_what_its_lock_names_and_nothing_of_ours(tmp_path: Path, images: Path) -> None:
    lines: list[str] = []

    interpreter = ensure_environment("small", cache=tmp_path / "cache", report=lines.append, images=images)

    assert run(interpreter, "import tiny; print(tiny.ANSWER)") == "42"
    assert run(interpreter, "import importlib.util as i; print(i.find_spec('pydantic'))") == "None"
    assert interpreter.is_relative_to(tmp_path / "cache" / "envs")
    assert lines[:2] == [
        f"making the environment {interpreter.parents[1].name}",
        "The environment of the image small is made, which is done once: 1 package, about 0 MB to download where uv's "
        "cache holds none of them",
    ]
    assert any(line.startswith("Installed 1 package") for line in lines)


def test_what_is_to_be_downloaded_is_announced_apart_and_only_where_it_is(tmp_path: Path, images: Path) -> None:
    announced: list[str] = []
    lines: list[str] = []

    for _ in range(2):
        ensure_environment(
            "small", cache=tmp_path / "cache", report=lines.append, announce=announced.append, images=images
        )

    assert len(announced) == 1
    assert "about 0 MB to download" in announced[0]
    assert not set(announced) & set(lines)


def test_an_environment_is_made_once_for_a_lock_and_anew_for_another(tmp_path: Path, images: Path) -> None:
    first = ensure_environment("small", cache=tmp_path / "cache", report=str, images=images)
    lines: list[str] = []

    again = ensure_environment("small", cache=tmp_path / "cache", report=lines.append, images=images)
    with (images / "small" / "requirements.txt").open("a") as lock:
        lock.write("# changed\n")
    changed = ensure_environment("small", cache=tmp_path / "cache", report=str, images=images)

    assert (again, lines) == (first, [])
    assert changed != first


def test_an_environment_that_was_not_completed_is_made_anew(tmp_path: Path, images: Path) -> None:
    interpreter = ensure_environment("small", cache=tmp_path / "cache", report=str, images=images)
    folder = interpreter.parents[1]
    (folder / COMPLETE_MARKER).unlink()
    next(folder.rglob("tiny.py")).unlink()

    ensure_environment("small", cache=tmp_path / "cache", report=str, images=images)

    assert run(interpreter, "import tiny; print(tiny.ANSWER)") == "42"


def test_two_processes_that_ask_at_once_make_one_environment(tmp_path: Path, images: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from posttrain.local.environments import ensure_environment\n"
        "print(ensure_environment('small', cache=Path(sys.argv[1]), report=print, images=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(images)]

    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]

    assert [process.returncode for process in both] == [0, 0]
    assert sum("making the environment" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_wheel_that_is_not_the_locked_one_is_refused_with_uvs_own_words(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "wheels", name="tiny", module="ANSWER = 'another'\n")
    write_lock(tmp_path / "images", name="small", wheel=wheel, digest="0" * 64)

    with pytest.raises(UserError, match="Hash mismatch") as caught:
        ensure_environment("small", cache=tmp_path / "cache", report=str, images=tmp_path / "images")

    assert "run the same command again" in str(caught.value)


def test_an_image_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UserError, match=r"no image 'large'.*take one of these: small"):
        ensure_environment("large", cache=tmp_path / "cache", report=str, images=images)


def test_a_machine_without_nvidias_driver_takes_the_lock_for_cpus_where_there_is_one(images: Path) -> None:
    (images / "small" / "requirements-cpu.txt").write_text((images / "small" / "requirements.txt").read_text())
    (images / "small" / "cpu").mkdir()
    (images / "small" / "cpu" / "pyproject.toml").write_text(METADATA_ONLY)

    with_gpu = find_lock("small", images=images, nvidia=True)
    without = find_lock("small", images=images, nvidia=False)

    assert (with_gpu.name, with_gpu.requirements.name, with_gpu.metadata) == ("small", "requirements.txt", None)
    assert (without.name, without.requirements.name) == ("small-cpu", "requirements-cpu.txt")
    assert without.metadata == images / "small" / "cpu"
    key = without.key
    (images / "small" / "cpu" / "pyproject.toml").write_text(f"{METADATA_ONLY}# changed\n")
    assert find_lock("small", images=images, nvidia=False).key != key


def test_the_variant_for_cpus_has_the_metadata_by_which_it_is_found(tmp_path: Path, images: Path) -> None:
    (images / "small" / "requirements-cpu.txt").write_text((images / "small" / "requirements.txt").read_text())
    (images / "small" / "cpu").mkdir()
    (images / "small" / "cpu" / "pyproject.toml").write_text(METADATA_ONLY)
    (images / "small" / "cpu" / "backend.py").write_text(BACKEND)
    lines: list[str] = []

    interpreter = ensure_environment(
        "small", cache=tmp_path / "cache", report=lines.append, images=images, nvidia=False
    )

    assert run(interpreter, "import importlib.metadata as m; print(m.version('large'))") == "1.0+cpu"
    assert interpreter.parents[1].name.startswith("small-cpu-")
    assert "it is the variant for machines where nvidia-smi finds no GPU" in lines


def test_the_trainers_lock_is_found_beside_its_dockerfile() -> None:
    assert images_root() == REPOSITORY / "images"
    assert (images_root() / "trainer" / "Dockerfile").is_file()


def test_a_wheel_of_posttrain_ships_the_locks(tmp_path: Path) -> None:
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path, REPOSITORY], check=True)

    (wheel,) = tmp_path.glob("*.whl")

    shipped = zipfile.ZipFile(wheel).read("posttrain/_images/trainer/requirements.txt")
    assert shipped == (REPOSITORY / "images" / "trainer" / "requirements.txt").read_bytes()


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_root({"POSTTRAIN_CACHE": "/data/cache"}) == Path("/data/cache")
    assert cache_root({}) == Path.home() / ".cache" / "posttrain"
