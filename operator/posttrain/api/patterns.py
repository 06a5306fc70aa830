"""What a pattern of the schema means to a person.

It owns one sentence a pattern; it must not hold patterns of its own.
"""

from __future__ import annotations

from typing import get_args

from pydantic import StringConstraints

from posttrain.api.base import DnsLabel, ObjectName
from posttrain.api.grpo import PistonAddress
from posttrain.api.inputs import SOURCE_PATTERN, EntryPoint, HubEndpoint
from posttrain.api.resources import EnvironmentName
from posttrain.api.spelling import write_value

_SOURCES = "org/name (or hf://org/name) on the Hub, pvc://claim/path in a volume, file:///path on this machine"


def _pattern_of(alias: object) -> str:
    return next(str(part.pattern) for part in get_args(alias) if isinstance(part, StringConstraints))


_MEANINGS = {
    _pattern_of(DnsLabel): "a name of lower-case letters, digits and hyphens that begins with a letter",
    _pattern_of(ObjectName): "a name of lower-case letters, digits, hyphens and dots",
    _pattern_of(EntryPoint): 'of the form "module:Name", the module in spec.code and the name in the module',
    _pattern_of(EnvironmentName): "a name of letters, digits and underscores that does not begin with a digit",
    _pattern_of(HubEndpoint): "an address that begins with https:// or http://",
    _pattern_of(PistonAddress): "the address of a server, as in http://host:2000",
}


def explain_pattern(pattern: str, value: str) -> str:
    """Return why `value` does not match, and what to write."""
    if pattern == SOURCE_PATTERN:
        return _explain_source(value)
    return f"{write_value(value)} is not {_MEANINGS[pattern]}"


def _explain_source(value: str) -> str:
    text = f"{write_value(value)} names no source"
    if value.startswith("s3://"):
        return f"{text}: s3:// is not supported yet; copy the data to a volume and write pvc://claim/path"
    if value.startswith("~"):
        return f"{text}: write file:// and the whole path, without ~"
    if value.startswith(("/", "./", "../")):
        return f"{text}: a path on this machine is written file://{value}"
    if value.startswith("pvc://"):
        return f"{text}: write pvc://, the claim's name and a path in it, as in pvc://team-data/train.jsonl"
    if "huggingface.co/" in value:
        return f"{text}: of the Hub's address write only org/name"
    return f"{text}: write {_SOURCES}"


def known_patterns() -> frozenset[str]:
    """Return the patterns that have a meaning here."""
    return frozenset(_MEANINGS) | {SOURCE_PATTERN}
