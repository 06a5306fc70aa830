"""Two sandboxes that the tests share: one under the tests' own user, one under a user without any rights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posttrain_workloads.sandbox.landlock import abi_version
from tests.support.sandbox import RunningSandbox, running_sandbox, unprivileged_python

_OPTIONS = ("--concurrency", "4", "--memory-mib", "512", "--max-seconds", "60")


@pytest.fixture(scope="session", params=["own user", "unprivileged"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[RunningSandbox]:
    """A sandbox that serves; four programs at a time."""
    require_landlock()
    unprivileged = request.param == "unprivileged"
    if unprivileged and unprivileged_python() is None:
        pytest.skip("only root can start a process of another user, and it needs a Python that everybody may read")
    with running_sandbox(*_OPTIONS, unprivileged=unprivileged) as running:
        yield running


def require_landlock() -> None:
    """Skip where the kernel has no Landlock: there a sandbox does not start at all."""
    if abi_version() == 0:
        pytest.skip("this kernel has no Landlock, so that no sandbox starts")
