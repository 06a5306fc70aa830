"""Machines of E2B and of Morph, each through its service's own SDK, which is imported when the first one is lent.

It owns the calls of the SDKs; it must not know what is run on a machine.
"""

from __future__ import annotations

import base64
import shlex
from typing import Any

_READY_SECONDS = 300.0
_ARGUMENT_CHARACTERS = 64 * 1024
"""Linux takes 128 KiB as one argument, and quoting may add to it."""
_FOLDER = "${TMPDIR:-/tmp}"


class E2bMachine:
    """A sandbox of E2B's code interpreter, without a network."""

    def __init__(self, *, api_key: str, template: str | None, seconds: int) -> None:
        from e2b_code_interpreter import Sandbox

        self._sandbox: Any = Sandbox.create(
            template=template, timeout=seconds, allow_internet_access=False, api_key=api_key
        )

    def execute(self, source: str, *, seconds: float) -> str:
        """Run Python code in the kernel there; return what it prints.

        Raises:
            RuntimeError: the code ended with an error.
        """
        execution = self._sandbox.run_code(source, language="python", timeout=seconds)
        if execution.error is not None:
            raise RuntimeError(f"{execution.error.name}: {execution.error.value}")
        return "".join(execution.logs.stdout)

    def give_back(self) -> None:
        """End the sandbox."""
        self._sandbox.kill()


class MorphMachine:
    """An instance of a snapshot of Morph."""

    def __init__(self, *, api_key: str, template: str | None, seconds: int) -> None:
        from morphcloud.api import MorphCloudClient

        assert template is not None  # by a rule of the spec
        self._instance: Any = MorphCloudClient(api_key=api_key).instances.start(
            snapshot_id=template, ttl_seconds=seconds, ttl_action="stop", timeout=_READY_SECONDS
        )

    def execute(self, source: str, *, seconds: float) -> str:
        """Run Python code in a process there; return what it prints.

        Raises:
            RuntimeError: the process failed.
        """
        text = base64.b64encode(source.encode()).decode()
        parts = [text[begin : begin + _ARGUMENT_CHARACTERS] for begin in range(0, len(text), _ARGUMENT_CHARACTERS)]
        # Each part replaces what is there: the SDK sends a command again where the connection was lost.
        for number, part in enumerate(parts):
            self._shell(f"printf %s {shlex.quote(part)} > {_FOLDER}/errand.{number:06}", seconds=seconds)
        printed: str = self._shell(
            f"cat {_FOLDER}/errand.0* | base64 -d > {_FOLDER}/errand.py && rm {_FOLDER}/errand.0* && "
            f"python3 {_FOLDER}/errand.py",
            seconds=seconds,
        )
        return printed

    def give_back(self) -> None:
        """End the instance."""
        self._instance.stop()

    def _shell(self, command: str, *, seconds: float) -> str:
        done = self._instance.exec(command, timeout=seconds)
        if done.exit_code != 0:
            raise RuntimeError(f"exit code {done.exit_code}: {done.stderr[-500:]}")
        printed: str = done.stdout
        return printed
