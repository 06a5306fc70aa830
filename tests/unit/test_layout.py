"""The layout that packaging and containers rely on: folders, the base dependencies, the wheel."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "operator" / "posttrain", ROOT / "workloads" / "posttrain_workloads")


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder: Path, *, named: str) -> set[str]:
    """Return the paths of the files in `folder`, as if it had the name `named`."""
    return {
        f"{named}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="session")
def base_python() -> Path:
    """The interpreter of an environment with the base dependencies only, made once for each lock."""
    cache = Path(os.environ.get("POSTTRAIN_CACHE", Path.home() / ".cache" / "posttrain"))
    inputs = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "uv.lock")]
    key = hashlib.sha256(b"\0".join([*inputs, sys.version.encode()])).hexdigest()[:16]
    environment = cache / "test-base" / key
    if not environment.exists():
        environment.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=environment.parent, prefix=f"{key}."))
        run(
            *(find_uv_bin(), "sync", "--locked", "--no-default-groups", "--no-install-project"),
            *("--python", sys.executable),
            env={"UV_PROJECT_ENVIRONMENT": str(building)},
        )
        try:
            building.rename(environment)
        except OSError:  # another test process was faster
            shutil.rmtree(building)
    return environment / "bin" / "python"


def test_operator_is_a_folder_and_never_a_package() -> None:
    """The standard library has a module of that name."""
    assert [path.name for path in (ROOT / "operator").glob("*.py")] == []
    same_folder = "import operator, os; print(os.path.dirname(operator.__file__) == os.path.dirname(os.__file__))"
    assert run(sys.executable, "-c", same_folder) == "True\n"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_folder_of_a_package_is_a_package(package: Path) -> None:
    """The import rules see no module in a folder without `__init__.py`."""
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_api_and_contract_import_with_the_base_dependencies_only(base_python: Path) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sorted(files_in(PACKAGES[0], named="posttrain"))
        if name.startswith(("posttrain/api/", "posttrain/contract/")) and name.endswith(".py")
    ]
    assert {"posttrain.api", "posttrain.contract"} < set(modules)
    script = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    run(base_python, "-c", script, env={"PYTHONPATH": str(ROOT / "operator")})


def test_the_wheel_holds_both_packages_and_the_locks(tmp_path: Path) -> None:
    run(find_uv_bin(), "build", "--wheel", "--quiet", "--out-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        scripts = archive.read(entry_points).decode()
    packages = [files_in(package, named=package.name) for package in PACKAGES]
    images = files_in(ROOT / "images", named="posttrain/_images")
    what_makes_the_lock = {"posttrain/_images/vllm/pyproject.toml"}
    assert held == set().union(*packages, images - what_makes_the_lock, {"posttrain/uv.lock"})
    assert scripts.splitlines() == [
        *("[console_scripts]", "posttrain = posttrain.cli:main", ""),
        "[vllm.general_plugins]",
        "posttrain_gloo = posttrain_workloads.rollout_plugin:register_gloo",
        "posttrain_last_words = posttrain_workloads.rollout_plugin:tell_the_cause",
        "posttrain_plain_weights = posttrain_workloads.rollout_plugin:keep_plain_weights",
        "posttrain_seeds = posttrain_workloads.rollout_plugin:vary_seeds",
    ]
