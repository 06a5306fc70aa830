"""An environment in which a number is guessed, and a trainer whose model seems to call its tool; no tiny one does."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer

RIGHT = 7


class Guess:
    """One game: the number is RIGHT, and there is one guess."""

    def reset(self, **row: Any) -> str:
        """Begin a game for a row of the data."""
        assert "problem" not in row and isinstance(row["posttrain_row"], int)
        self.won = False
        return " Guess a number."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess
        """
        self.won = number == RIGHT
        return "right" if self.won else "wrong"

    def get_reward(self) -> float:
        """Return what the game is worth."""
        return float(self.won)


class GuessingTrainer(GRPOTrainer):
    """Has every second completion guess right and the others wrong, and all of them end after that."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        tokenizer, texts = self.processing_class, []
        for number, prompt in enumerate(tokenizer.batch_decode(prompt_ids)):
            assert "Guess a number." in prompt and '"name": "guess"' in prompt
            guess = RIGHT if number % 2 else RIGHT + 1
            call = f'<tool_call>\n{{"name": "guess", "arguments": {{"number": {guess}}}}}\n</tool_call>'
            texts.append("It is over." if "<tool_response>" in prompt else call)
        return [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts], None


def told(completions: list[Any], environments: list[Guess], **columns: Any) -> list[float]:
    """Return 1 for each completion in which the model was told that it was right."""
    said = [[message["content"] for message in completion if message["role"] == "tool"] for completion in completions]
    assert [words == ["right"] for words in said] == [game.won for game in environments]
    return [float(words == ["right"]) for words in said]
