"""Whether a run still has something good to learn from: the checks of spec.grpo.signal over what the trainer logs.

It owns the counting of logged steps and the facts that tell of a change; it must not import torch, nor act on what it
finds: what follows is the plan's to say, since that may change while the run lives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.api.signal import SignalCheck
from posttrain.contract.facts import SignalLost, SignalRegained


class SignalWatch:
    """Counts for each check how many logged steps in a row were beyond its bound."""

    def __init__(self, checks: Iterable[SignalCheck]) -> None:
        self._streaks = {check: 0 for check in checks}

    def see(self, logs: Mapping[str, Any], *, step: int) -> list[SignalLost | SignalRegained]:
        """Take what was logged at a step, and return what changed.

        A metric that is not there, or no finite number, counts neither way.
        """
        changes: list[SignalLost | SignalRegained] = []
        for check, streak in self._streaks.items():
            value = logs.get(check.METRIC)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            self._streaks[check] = streak + 1 if check.finds(value) else 0
            if self._streaks[check] == check.steps:
                message = (
                    f"{check.METRIC} is {value:.4g} at step {step}, and was {check.BAD} {check.bound} for "
                    f"{check.steps} logged step{'s' * (check.steps > 1)} in a row"
                )
                changes.append(SignalLost(reason=check.REASON, message=message, step=step))
            elif self._streaks[check] == 0 and streak >= check.steps:
                changes.append(SignalRegained(reason=check.REASON, step=step))
        return changes
