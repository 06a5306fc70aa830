"""What CI promises: that the tiers whose programs are there did run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_MARKERS = {"control-plane": "integration", "node": "e2e", "kueue": "kueue"}
"""Part of the test cluster to the marker of the tests that prove something with it."""


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


def pytest_configure(config: pytest.Config) -> None:
    parts = [part for part in os.environ.get("POSTTRAIN_REQUIRE", "").split(",") if part]
    if unknown := set(parts) - _MARKERS.keys():
        raise pytest.UsageError(f"$POSTTRAIN_REQUIRE names {sorted(unknown)}; there are {sorted(_MARKERS)}")
    if parts:
        config.pluginmanager.register(PromisedTiers(parts))
