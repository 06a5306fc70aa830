"""Whether vLLM takes the options that a run gives its rollout servers, by the parser of `vllm serve` itself.

It owns what is said of one that vLLM does not know or cannot read; it must not start an engine, nor need a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any, NoReturn

from pydantic import JsonValue

from posttrain.api.spelling import nearest, write_value
from posttrain.contract.config import TrainingConfig
from posttrain_workloads import _compat
from posttrain_workloads.problems import Findings, Problem
from posttrain_workloads.serve import write_option

_PATH = "spec.grpo.rollout.server.args"
_MODULE = "vllm"
_ARGUMENT = re.compile(r"^argument \S+: ")


class _Unreadable(Exception):
    """The parser's own words."""


def check_server_options(config: TrainingConfig, findings: Findings) -> None:
    """Add a problem for each option that `vllm serve` would end on; an image without vLLM is a problem of its own."""
    servers = config.spec.rollout_servers
    if servers is None or not servers.args or importlib.util.find_spec(_MODULE) is None:
        return
    parser = build_parser()
    known = {name for name in _compat.long_options(parser) if name != "help"}
    for name, value in servers.args.items():
        wrong = _judge(parser, name, value, known=known)
        if wrong is not None:
            findings.add(Problem("ConfigInvalid", f"{_PATH}.{name}: {wrong}"))


def build_parser() -> Any:
    """Return the parser of `vllm serve`, which here raises what it would else end the process with."""
    _compat.assume_cpus()  # prepare has no GPU
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise _Unreadable(message)

    return make_arg_parser(Parser(prog="vllm serve"))


def _judge(parser: Any, name: str, value: JsonValue, *, known: set[str]) -> str | None:
    if name not in known:  # argparse takes the beginning of a name for it, which is how one means another option
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else "`vllm serve --help=all` in its image lists them"
        return f"vLLM {importlib.metadata.version(_MODULE)} has no such option: {hint}"
    try:
        parsed = parser.parse_args(list(write_option(name, value)))
    except _Unreadable as error:
        words = _ARGUMENT.sub("", " ".join(str(error).split()))
        return f"vLLM cannot read {write_value(value)}: {words}"
    if parsed.model_tag is not None:
        return f"the option takes no value, and has {write_value(value)}: write true, or no-{name} to turn it off"
    return None
