"""The first rows as the trainer will see them: rendered, tokenized, masked and cut by TRL itself.

It owns how TRL's own preparation is run on a few rows without the model; it must not re-implement any of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from posttrain.api.training_run import Method
from posttrain_workloads.problems import Problem, refuse

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN_ROWS = 8
_FIRST_ROWS = 64
_LONGEST_ROWS = 16
_IGNORED = -100

# A model of a few bytes on a CPU: nothing of a GPU, of trackers or of the real model's layers must matter.
_ON_A_CPU: Mapping[str, Any] = {
    "use_cpu": True,
    "ddp_backend": None,  # with one, accelerate takes a lone process for a rank
    "bf16": False,
    "fp16": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "tf32": None,
    "optim": "adamw_torch",
    "report_to": "none",
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "use_liger_kernel": False,
    "liger_kernel_config": None,
    "activation_offloading": False,
    "router_aux_loss_coef": None,
    "dataset_num_proc": None,
}
_ROW_BY_ROW: Mapping[str, Any] = {
    "packing": False,
    "padding_free": False,
    "max_length": None,
    "eval_strategy": "no",
    "eval_on_start": False,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "shuffle_dataset": False,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tokenized row; `mask` is 1 where the loss is taken."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    def cut(self, max_length: int | None) -> Row:
        """Return what is left of it at `max_length`."""
        return Row(ids=self.ids[:max_length], mask=self.mask[:max_length])

    @property
    def trained(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(self.mask)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The first rows of the data, and the longest ones."""

    first: tuple[Row, ...]
    longest: tuple[Row, ...]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row of all."""
        return max(len(row.ids) for row in (*self.first, *self.longest))

    def mean_tokens(self, max_length: int | None) -> float:
        """Return the mean tokens of a row after it has been cut."""
        return sum(len(row.cut(max_length).ids) for row in self.first) / len(self.first)


def render(
    train: Dataset, test: Dataset | None, *, tokenizer: Any, args: Mapping[str, Any], characters: Sequence[int]
) -> Rendered:
    """Return rows as TRL prepares them with `args` (all keys of SFTConfig); `characters` tell which are the longest.

    Raises:
        InvalidInputs: TRL refuses the arguments or the rows.
    """
    order = sorted(range(len(train)), key=lambda index: characters[index], reverse=True)
    first = train.select(range(min(_FIRST_ROWS, len(train))))
    longest = train.select(order[:_LONGEST_ROWS])
    few = test.select(range(min(_LONGEST_ROWS, len(test)))) if test is not None else None
    # As the run will be: whatever TRL has against the arguments it says here.
    _build_trainer(first, few, tokenizer=tokenizer, args={**args, **_ON_A_CPU})
    each = {**args, **_ON_A_CPU, **_ROW_BY_ROW}
    return Rendered(
        first=_rows(_build_trainer(first, None, tokenizer=tokenizer, args=each)),
        longest=_rows(_build_trainer(longest, None, tokenizer=tokenizer, args=each)),
    )


def to_json(rendered: Rendered, *, tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Return the first rows for samples.json: text, token ids, mask, and the text in stretches of equal mask."""
    samples = []
    for whole in rendered.first[:SHOWN_ROWS]:
        row = whole.cut(max_length)
        stretches = [
            ([token for token, _ in group], bool(bit))
            for bit, group in groupby(zip(row.ids, row.mask, strict=True), key=lambda pair: pair[1])
        ]
        samples.append(
            {
                "text": tokenizer.decode(row.ids),
                "ids": list(row.ids),
                "mask": list(row.mask),
                "tokens": len(row.ids),
                "trained_tokens": row.trained,
                "tokens_cut": len(whole.ids) - len(row.ids),
                "segments": [{"text": tokenizer.decode(ids), "trained": trained} for ids, trained in stretches],
            }
        )
    return samples


def judge_rows(
    rendered: Rendered, *, max_length: int | None, packing: bool, tokenizer: Any
) -> tuple[list[Problem], list[str]]:
    """Return what is wrong with the rendered rows, and what is odd about them."""
    problems, warnings = [], []
    limit = None if packing else max_length
    lost = sum(row.cut(limit).trained == 0 for row in rendered.first)
    cut = sum(len(row.ids) > max_length for row in rendered.first) if max_length is not None else 0
    if lost == len(rendered.first):
        problems.append(
            Problem(
                "DatasetEmpty",
                f"none of the first {lost} rows has a token that is trained on"
                + (f" within max_length {max_length}" if limit is not None else "")
                + ": raise spec.sft.args.max_length, or look at completion_only_loss, assistant_only_loss and the "
                "chat template's {% generation %} marks",
            )
        )
    elif lost:
        warnings.append(
            f"{lost} of the first {len(rendered.first)} rows have no token that is trained on within max_length "
            f"{max_length}, and TRL drops such rows: raise spec.sft.args.max_length"
        )
    if cut and max_length is not None:
        warnings.append(
            f"{cut} of the first {len(rendered.first)} rows are longer than max_length {max_length} and are cut; the "
            f"longest row has about {rendered.max_tokens} tokens"
        )
    if not any(tokenizer.eos_token_id in row.ids for row in rendered.first):
        warnings.append(
            f"no rendered row contains the token that ends a turn ({tokenizer.eos_token}): the model will not learn to "
            "stop; set spec.model.eosToken to the token that the chat template ends a turn with"
        )
    return problems, warnings


def _rows(trainer: Any) -> tuple[Row, ...]:
    rows = []
    for example in trainer.train_dataset:
        batch = trainer.data_collator([{"input_ids": example["input_ids"], "labels": example["labels"]}])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        length = len(example["input_ids"])  # without pad_to_multiple_of
        mask = tuple(int(label != _IGNORED) for label in labels[:length])
        rows.append(Row(ids=tuple(ids[:length]), mask=mask))
    return tuple(rows)


def _build_trainer(train: Dataset, test: Dataset | None, *, tokenizer: Any, args: Mapping[str, Any]) -> Any:
    import jinja2
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    try:
        return SFTTrainer(
            model=LlamaForCausalLM(shape),
            args=SFTConfig(**args),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
        )
    except jinja2.TemplateError as error:
        raise refuse(
            "ConfigInvalid",
            f"spec.model.chatTemplate: the template (or the tokenizer's own) fails on the data: {error}",
        ) from error
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise refuse(
            "ConfigInvalid", f"{name_key(str(error), args, method='sft')}: {type(error).__name__}: {error}"
        ) from error


def name_key(text: str, args: Mapping[str, Any], *, method: Method) -> str:
    """Return the place in the spec that an error of TRL or transformers speaks of."""
    words = set(text.replace("`", " ").replace("--", " ").replace("=", " ").replace(",", " ").split())
    named = [key for key in args if key in words]
    path = f"spec.{method}.args"
    return f"{path}.{named[0]}" if named else path
