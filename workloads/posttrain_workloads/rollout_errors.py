"""How a conversation with rollout servers fails.

It owns the two errors; it must not decide which of them a failure is.
"""

from __future__ import annotations

from posttrain.contract.result import ExitCode
from posttrain_workloads.runtime import RankFailure


class RolloutError(RankFailure):
    """The rollout servers cannot do what was asked of them; the message names the server and the likely cause."""

    def __init__(self, message: str) -> None:
        super().__init__("RolloutFailed", message)


class ServerLost(RolloutError):
    """A server does not answer, or lost what it had been given. It may be back after a restart."""

    def __init__(self, message: str) -> None:
        RankFailure.__init__(self, "ServerLost", message, exit_code=ExitCode.TRANSIENT)
