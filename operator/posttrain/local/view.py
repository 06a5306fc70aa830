"""What a local run shows while it goes on, as a port.

It owns what there is to show; it must not know how it is shown.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from posttrain.api.training_run import TrainingRun
from posttrain.local.state import RunFolder
from posttrain.plan.types import Event


class View(Protocol):
    """Where a local run tells a person what it does. Called from one thread only."""

    def stage(self, text: str) -> None:
        """Say what is being done before there is a run to show: each text replaces the one before."""

    def message(self, text: str) -> None:
        """Show a text that stays, such as how to resume."""

    def update(self, run: TrainingRun) -> None:
        """Show the run as it stands; called often, and with nothing new."""

    def event(self, event: Event) -> None:
        """Show an event of the run."""

    def finish(self, run: TrainingRun, folder: RunFolder) -> None:
        """Show how the run ended, and where what it wrote lies. Not called when the run was interrupted."""


class SteadyView:
    """A view whose output may be gone (a closed terminal, the end of a pipe): the run goes on without it."""

    def __init__(self, view: View) -> None:
        self._view = view

    def stage(self, text: str) -> None:
        """Pass it on."""
        with suppress(OSError):
            self._view.stage(text)

    def message(self, text: str) -> None:
        """Pass it on."""
        with suppress(OSError):
            self._view.message(text)

    def update(self, run: TrainingRun) -> None:
        """Pass it on."""
        with suppress(OSError):
            self._view.update(run)

    def event(self, event: Event) -> None:
        """Pass it on."""
        with suppress(OSError):
            self._view.event(event)

    def finish(self, run: TrainingRun, folder: RunFolder) -> None:
        """Pass it on with its errors: nothing is left to go on, and a report that cannot be written is worth one."""
        self._view.finish(run, folder)
