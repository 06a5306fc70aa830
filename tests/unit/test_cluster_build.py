"""The test cluster's programs: built once, whole or not at all, within their time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.build import Budget, BuildError, OutOfTimeError, build_component, main
from tests.cluster.components import PARTS, Component, program, why_not

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")

HELLO = 'package main\n\nfunc main() { println("hello") }\n'
NO_END = Budget(None)


def build_module(folder: Path, *, source: str = HELLO, manifests: Mapping[str, str] | None = None) -> Component:
    """Return a component that is a Go module without dependencies."""
    folder.mkdir()
    (folder / "go.mod").write_text("module tiny.test\n\ngo 1.22\n")
    (folder / "go.sum").write_text("")
    (folder / "main.go").write_text(source)
    (folder / "rbac").mkdir()
    (folder / "rbac" / "role.yaml").write_text("kind: Role\n")
    packages = {"hello": "tiny.test", "again": "tiny.test"}
    return Component(name="tiny", module=str(folder), packages=packages, manifests=manifests or {})


def build(component: Component, *, budget: Budget = NO_END) -> list[str]:
    lines: list[str] = []
    build_component(component, budget=budget, report=lines.append)
    return lines


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path / "cache" / "cluster"


@needs_go
def test_a_component_is_built_once_with_its_manifests(tmp_path: Path, cache: Path) -> None:
    component = build_module(tmp_path / "tiny", manifests={"tiny.test": "rbac"})
    assert not component.is_built()

    lines = build(component)

    assert [line.partition(":")[0] for line in lines] == ["built hello", "built again"]
    assert program(component, "hello").is_file()
    assert (component.folder / "manifests" / "role.yaml").read_text() == "kind: Role\n"
    assert {path.name for path in cache.iterdir()} == {component.folder.name, f"{component.folder.name}.lock"}
    assert component.is_built()
    assert build(component) == []


@needs_go
def test_another_module_lies_elsewhere(tmp_path: Path) -> None:
    component = build_module(tmp_path / "tiny")
    before = component.folder

    (tmp_path / "tiny" / "go.sum").write_text("# another\n")

    assert component.folder != before
    assert component.folder.parent == before.parent


@needs_go
def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    component = build_module(tmp_path / "tiny", source="package main\n\nfunc main() { missing() }\n")

    with pytest.raises(BuildError, match=r"(?s)go build .*exit code 1:.*undefined: missing"):
        build(component)

    assert [path.name for path in cache.iterdir()] == [f"{component.folder.name}.lock"]


@needs_go
def test_a_build_ends_with_its_time(tmp_path: Path, cache: Path) -> None:
    component = build_module(tmp_path / "tiny")

    with pytest.raises(OutOfTimeError):
        build(component, budget=Budget(time.monotonic() + 0.01))

    assert not component.is_built()
    assert not list(cache.glob("*.tmp"))


@needs_go
def test_given_programs_are_taken_and_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component = build_module(tmp_path / "tiny")
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "hello").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))

    assert [line.partition(":")[0] for line in build(component)] == ["built again"]
    assert program(component, "hello") == assets / "hello"

    monkeypatch.delenv("KUBEBUILDER_ASSETS")
    assert not component.is_built()


@needs_go
def test_parts_without_time_are_named_in_their_order_and_are_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--until", "1"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["NOT RUN", part] for part in PARTS]
    assert why_not("kueue") == "not built: kueue (make cluster-binaries)"
