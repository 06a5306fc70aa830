"""The shapes of what a resource reads: model, datasets, access, own code.

It owns what a field means and which values it takes; it must not know how a plan uses them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from posttrain.api.base import (
    ApiModel,
    Distinct,
    Fraction,
    JsonObject,
    LongText,
    ObjectName,
    RunName,
    ShortText,
)
from posttrain.api.rules import Rule

HUB_SOURCE = r"(hf://)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?"
PVC_SOURCE = r"pvc://[a-z]([-a-z0-9]{0,61}[a-z0-9])?/[^\s]+"
FILE_SOURCE = r"file://[^\s]([^\r\n]*[^\s])?"
SOURCE_PATTERN = f"^({HUB_SOURCE}|{PVC_SOURCE}|{FILE_SOURCE})$"

Source = Annotated[str, StringConstraints(pattern=SOURCE_PATTERN, min_length=1, max_length=1100)]
EntryPoint = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        max_length=256,
    ),
]
"""`module:Name`, resolved in the run's own code."""

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
HubEndpoint = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$", max_length=512)]


class RunRef(ApiModel):
    """Another TrainingRun of the same namespace, whose final model is meant."""

    name: RunName = Field(description="Name of the run.", examples=["sft"])


class Model(ApiModel):
    """The model a run starts from."""

    source: Source | None = Field(
        default=None,
        description="Where the model lies: a Hub id, `hf://org/name`, `pvc://claim/path`, or, on one machine only, "
        "`file://` with an absolute path or one relative to the resource's file.",
        examples=["Qwen/Qwen2.5-1.5B-Instruct"],
    )
    run_ref: RunRef | None = Field(
        default=None,
        description="In place of source: the model that another TrainingRun ends with. The run waits until that one "
        "has succeeded.",
        examples=[{"name": "sft"}],
    )
    revision: ShortText | None = Field(
        default=None,
        description="Branch, tag or commit on the Hub. A moving one is resolved to a commit once and recorded in "
        "status.provenance. Default: main.",
        examples=["main"],
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that lies in the model's repository. Default: false.",
        examples=[False],
    )
    chat_template: LongText | None = Field(
        default=None,
        description="A Jinja chat template in place of the tokenizer's own.",
        examples=["{% for message in messages %}{{ message['content'] }}{% endfor %}"],
    )
    eos_token: ShortText | None = Field(
        default=None,
        description="The token that ends a turn, where it is not the tokenizer's own: a Qwen base model trained on "
        "ChatML needs `<|im_end|>`.",
        examples=["<|im_end|>"],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Element type in which the weights are loaded. `auto` takes the checkpoint's on a GPU and "
        "float32 on a CPU. Default: auto.",
        examples=["bfloat16"],
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        default=None,
        description="Attention kernel that transformers uses. Default: transformers' own choice.",
        examples=["sdpa"],
    )
    config: JsonObject | None = Field(
        default=None,
        max_length=64,
        description="Overrides of the model's configuration, such as RoPE scaling.",
        examples=[{"rope_theta": 300000.0, "max_position_embeddings": 32768}],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="source",
            message="exactly one of source and runRef says which model it is",
            cel="has(self.source) != has(self.runRef)",
            holds=lambda model: ("source" in model) != ("runRef" in model),
        ),
        Rule(
            field="revision",
            message="only what lies on the Hub has revisions: leave revision out, or name the model by source",
            cel="!has(self.revision) || !has(self.runRef)",
            holds=lambda model: "revision" not in model or "runRef" not in model,
        ),
    )

    @property
    def label(self) -> str:
        """What it is called where there is room for a name: its source, or the run that it comes from."""
        return self.source or (f"run {self.run_ref.name}" if self.run_ref else "")


class Rows(ApiModel):
    """A range of rows, taken before the fraction."""

    start: int = Field(default=0, ge=0, le=2**53, description="First row, from 0. Default: 0.", examples=[0])
    end: int | None = Field(
        default=None, ge=1, le=2**53, description="Row after the last one. Default: all.", examples=[1000]
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="end",
            message="end must be greater than start: rows from start up to, and without, end are used",
            cel="!has(self.end) || self.end > self.start",
            holds=lambda rows: "end" not in rows or rows["end"] > rows["start"],
        ),
    )


class Dataset(ApiModel):
    """One member of a dataset mixture."""

    source: Source = Field(
        description="A Hub id, `pvc://claim/path` or, on one machine only, `file://path`; a path is a JSON, JSONL, "
        "Parquet or CSV file, or a folder of files of one of these kinds.",
        examples=["open-r1/Mixture-of-Thoughts"],
    )
    config: ShortText | None = Field(default=None, description="Configuration of a Hub dataset.", examples=["all"])
    split: ShortText = Field(default="train", description="Split of a Hub dataset. Default: train.", examples=["train"])
    columns: Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=64), Distinct()] | None = Field(
        default=None,
        description="Columns to keep, after renaming. Default: all. The members' columns must agree.",
        examples=[["messages"]],
    )
    rename: dict[str, ColumnName] | None = Field(
        default=None,
        max_length=64,
        description="Columns to rename, from old to new name.",
        examples=[{"conversations": "messages"}],
    )
    rows: Rows | None = Field(
        default=None, description="Range of rows to use. Default: all.", examples=[{"start": 0, "end": 1000}]
    )
    revision: ShortText | None = Field(
        default=None,
        description="Branch, tag or commit on the Hub, resolved to a commit once. Default: main.",
        examples=["main"],
    )
    fraction: Fraction | None = Field(
        default=None,
        description="Share of this member's rows to use, above 0 and at most 1, taken after a seeded shuffle.",
        examples=["0.5"],
    )


class SecretKey(ApiModel):
    """One key of a Secret in the run's namespace."""

    name: ObjectName = Field(description="Name of the Secret.", examples=["hf-token"])
    key: ShortText = Field(description="Key inside the Secret.", examples=["token"])


class Access(ApiModel):
    """How everything that this resource reads and writes is reached."""

    hub_token_secret_ref: SecretKey | None = Field(
        default=None,
        description="Secret with a Hugging Face token, for gated or private models and data.",
        examples=[{"name": "hf-token", "key": "token"}],
    )
    hub_endpoint: HubEndpoint | None = Field(
        default=None,
        description="Another Hub than huggingface.co.",
        examples=["https://hub.example.com"],
    )
    service_account_name: ObjectName | None = Field(
        default=None,
        description="Service account of the pods. Default: one made for the run, without any right.",
        examples=["trainer"],
    )


class Code(ApiModel):
    """Own Python code, mounted read-only at /code and first on PYTHONPATH."""

    config_map_name: ObjectName | None = Field(
        default=None, description="ConfigMap whose keys are Python files.", examples=["my-callbacks"]
    )
    path: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="Folder on this machine (local runs only), absolute or relative to the resource's file.",
        examples=["./code"],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="",
            message="exactly one of configMapName and path says where the code lies",
            cel="has(self.configMapName) != has(self.path)",
            holds=lambda code: ("configMapName" in code) != ("path" in code),
        ),
    )


class Callback(ApiModel):
    """A transformers TrainerCallback of one's own."""

    function: EntryPoint = Field(
        description="`module:Name` of a TrainerCallback class, or of a function that returns one, in `code`.",
        examples=["callbacks:PrintSamples"],
    )
    params: JsonObject = Field(
        default={},
        max_length=64,
        description="Keyword arguments it is built with. Default: none.",
        examples=[{"every": 10}],
    )
