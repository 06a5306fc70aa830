"""A rollout in two turns, as `spec.code` brings it: the model is told that its answer is wrong, and may mend it."""

from __future__ import annotations

import re
from typing import Any

from posttrain_workloads.own_rollouts import generate, tokenize

NOTE = "\n<|im_start|>user\nThat is wrong. Try again.<|im_end|>\n<|im_start|>assistant\n"  # as SmolLM2 writes turns


def answer_twice(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Let the model answer, and answer once more where the sum in its prompt is another one."""
    tokenizer = trainer.processing_class
    end, note = tokenizer.eos_token_id, tokenizer(NOTE, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenize(trainer, prompts)
    answers, logprobs = generate(trainer, prompt_ids)
    # A turn that was cut off is ended for the model.
    notes = [note if ids[-1] == end else [end, *note] for ids in answers]
    # Ranks generate together, so right answers are followed by a second one too; that is not used.
    asked = [prompt + ids + told for prompt, ids, told in zip(prompt_ids, answers, notes, strict=True)]
    seconds, second_logprobs = generate(trainer, asked)

    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    wrong = [last_number(text) != work_out(prompt) for prompt, text in zip(prompts, texts, strict=True)]
    rollout: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "completion_ids": [],
        "logprobs": None if logprobs is None else [],
        "env_mask": [],  # 0 for what the model did not write
        "turns": [2 if again else 1 for again in wrong],  # a column for the rewards
    }
    for row, again in enumerate(wrong):
        told, second = (notes[row], seconds[row]) if again else ([], [])
        rollout["completion_ids"].append(answers[row] + told + second)
        rollout["env_mask"].append([1] * len(answers[row]) + [0] * len(told) + [1] * len(second))
        if logprobs is not None and second_logprobs is not None:
            later = second_logprobs[row] if again else []
            rollout["logprobs"].append([*logprobs[row], *[0.0] * len(told), *later])
    return rollout


def early(*, turns: list[int], **_: Any) -> list[float]:
    """Return 1 for an answer that was right at once, and 0.5 for one that needed, or failed in, a second turn."""
    return [1 / turn for turn in turns]


def work_out(prompt: Any) -> int | None:
    """Return what the sum in a prompt comes to."""
    found = re.search(r"(\d+(?: [+-] \d+)+) =", prompt[-1]["content"])
    return sum(int(term.replace(" ", "")) for term in re.findall(r"[+-]? ?\d+", found[1])) if found else None


def last_number(text: str) -> int | None:
    """Return the last whole number of an answer."""
    numbers = re.findall(r"-?\d+", text)
    return int(numbers[-1]) if numbers else None
