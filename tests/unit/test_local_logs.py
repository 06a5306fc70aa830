"""Which logs `posttrain logs` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.local.logs import find_logs
from posttrain.local.state import RunFolder

PODS = (
    *("demo-prepare-0", "demo-a1-master-0", "demo-a2-master-0"),
    *("demo-a2-worker-1", "demo-a2-worker-0", "demo-server-0"),
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "demo")
    folder.logs.mkdir(parents=True)
    return folder


def names(folder: RunFolder, attempt: int | None) -> list[str]:
    return [file.stem for file in find_logs(folder, attempt=attempt)]


def test_the_newest_attempts_logs_come_first_and_then_those_of_the_services(folder: RunFolder) -> None:
    for pod in PODS:
        folder.log_file(pod).touch()

    assert names(folder, None) == ["demo-a2-master-0", "demo-a2-worker-0", "demo-a2-worker-1", "demo-server-0"]
    assert names(folder, 1) == ["demo-a1-master-0"]
    assert names(folder, 0) == ["demo-prepare-0"]


def test_a_service_alone_has_a_log_already(folder: RunFolder) -> None:
    folder.log_file("demo-server-0").touch()

    assert names(folder, None) == ["demo-server-0"]


def test_no_log_and_an_unknown_attempt_are_told(folder: RunFolder) -> None:
    with pytest.raises(UserError, match="has written no log yet"):
        find_logs(folder, attempt=None)
    folder.log_file("demo-a1-master-0").touch()
    with pytest.raises(UserError, match="no log of attempt 2; there are logs of: 1"):
        find_logs(folder, attempt=2)
