"""A trainer whose model seems to write programs, which no tiny model does: what is scored is put into its mouth."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer

RIGHT = "```python\nprint(2 * int(input()))\n```"
WRONG = "```python\nwhile True:\n    print(input())\n```"


class ProgramTrainer(GRPOTrainer):
    """Has every second completion double a number, and the others fail at it."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: list[Any], completion_ids_list: Any) -> Any:
        written = [
            [{"role": "assistant", "content": WRONG if number % 2 else RIGHT}] for number in range(len(completions))
        ]
        return super()._calculate_rewards(inputs, prompts, written, completion_ids_list)
