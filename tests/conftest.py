"""What CI promises: that the tiers whose programs are there did run. And which tests may run beside each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_MARKERS = {"control-plane": "integration", "node": "e2e", "kueue": "kueue"}
"""Part of the test cluster to the marker of the tests that prove something with it."""
_ON_CLUSTERS = ("e2e", "integration")
"""The folders of those tests."""


class PromisedTiers:
    """Fails a session in which a promised tier ran no test: a renamed folder or marker must not pass for green."""

    def __init__(self, parts: list[str]) -> None:
        self._waiting = {_MARKERS[part]: part for part in parts}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            for marker in self._waiting.keys() & set(report.keywords):
                del self._waiting[marker]

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self._waiting and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        yield

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for marker, part in self._waiting.items():
            terminalreporter.write_line(
                f"NOT RUN: {part}: $POSTTRAIN_REQUIRE promises it, and no test marked {marker} ran", red=True
            )


class ClustersBesideTheRest(LoadScopeScheduling):
    """For `-n 2`: the tests on clusters, which wait a lot, one after another beside those that compute.

    Each other file stays in one process, for its fixtures. (`--dist loadgroup` does nothing with pytest 9.2,
    pytest-xdist issue 1386.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if Path(file).parent.name in _ON_CLUSTERS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ClustersBesideTheRest:
    config.option.loadscopereorder = False
    return ClustersBesideTheRest(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name not in (*_ON_CLUSTERS, "workloads"))


def pytest_configure(config: pytest.Config) -> None:
    parts = [part for part in os.environ.get("POSTTRAIN_REQUIRE", "").split(",") if part]
    if unknown := set(parts) - _MARKERS.keys():
        raise pytest.UsageError(f"$POSTTRAIN_REQUIRE names {sorted(unknown)}; there are {sorted(_MARKERS)}")
    if parts and not hasattr(config, "workerinput"):  # the process that the workers report to looks after all of them
        config.pluginmanager.register(PromisedTiers(parts))
