"""YAML text to data and back, in the dialect that kubectl reads: sigs.k8s.io/yaml over go.yaml.in/yaml/v2, then JSON.

It must not know any resource, nor let PyYAML decide what a scalar means: PyYAML only cuts the text into events.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from posttrain.api.scalars import format_float_key, resolve_plain, to_json_number
from posttrain.errors import UserError

Path = tuple[str | int, ...]
"""Where a value stands: mapping keys and list indices, from the root."""

# libyaml is what Go's reader was ported from; PyYAML's own scanner refuses some tabs that both of them accept.
_Parser: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

# Real resources are some 15 levels deep and expand no alias at all.
_MAX_DEPTH = 200
_MAX_ALIASED_NODES = 100_000


class LoadError(UserError, ValueError):
    """A text that cannot be read; the message says where, what happened and what to change."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One YAML document whose root is a mapping, as the JSON that kubectl would send."""

    data: dict[str, Any]
    origin: str
    line: int
    lines: Mapping[Path, int] = field(repr=False, compare=False)

    def line_of(self, path: Path) -> int | None:
        """Return the line (from 1) on which the value at `path` is written, or None if the text has no such value."""
        return self.lines.get(path)


def load_documents(text: str, *, origin: str) -> list[Document]:
    """Return the documents of `text` but the empty ones; `origin` (a file's name) opens every message.

    As for kubectl, `on` is true, `010` is 8, `1.0` is 1 and a date is a string. Unlike kubectl, which silently keeps
    one of the two, a key written twice is refused. A key may replace what an earlier `<<` merged.

    Raises:
        LoadError: the text is not YAML, has a key twice or a value that JSON lacks, or a root is not a mapping.
    """
    documents = []
    for root in _compose(text, origin=origin):
        builder = _Builder(origin=origin)
        data = builder.build(root, path=())
        if data is None:
            continue
        if not isinstance(data, dict):
            builder.fail(root, "a resource is a mapping that starts with apiVersion and kind, and this is not one")
        documents.append(Document(data=data, origin=origin, line=root.line, lines=builder.lines))
    return documents


# --- Text to nodes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scalar:
    line: int
    text: str
    tag: str | None
    plain: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sequence:
    line: int
    items: list[_Node]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mapping:
    line: int
    pairs: list[tuple[_Node, _Node]]


_Node = _Scalar | _Sequence | _Mapping


def _compose(text: str, *, origin: str) -> Iterator[_Node]:
    """Yield the root of each document; an alias is the very node of its anchor."""
    events = _parse_events(text, origin=origin)
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            first = next(events)
            _check_separator(event, first, origin=origin)
            yield _compose_node(first, events=events, anchors={}, origin=origin, depth=0)


def _check_separator(start: Any, first: Any, *, origin: str) -> None:
    empty = first.start_mark.index == first.end_mark.index
    if start.explicit and start.end_mark.line == first.start_mark.line and not empty:
        raise _error(origin, _line_of(first), "only a comment may follow '---': put the document on the next line")


def _compose_node(event: Any, *, events: Iterator[Any], anchors: dict[str, _Node], origin: str, depth: int) -> _Node:
    def compose(child: Any) -> _Node:
        return _compose_node(child, events=events, anchors=anchors, origin=origin, depth=depth + 1)

    line = _line_of(event)
    if depth > _MAX_DEPTH:
        raise _error(origin, line, f"nested more than {_MAX_DEPTH} levels deep: flatten it")
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise _error(origin, line, f"*{event.anchor} names no anchor: quote it if it is a text")
        return anchors[event.anchor]
    node: _Node
    if isinstance(event, yaml.ScalarEvent):
        tag = None if event.tag == "!" else event.tag
        node = _Scalar(line=line, text=event.value, tag=tag, plain=event.implicit[0])
    elif isinstance(event, yaml.SequenceStartEvent):
        node = _Sequence(line=line, items=[])
    else:
        node = _Mapping(line=line, pairs=[])
    if event.anchor is not None:
        anchors[event.anchor] = node
    if isinstance(node, _Sequence):
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            node.items.append(compose(item))
    elif isinstance(node, _Mapping):
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            node.pairs.append((compose(key), compose(next(events))))
    return node


def _line_of(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _parse_events(text: str, *, origin: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=_Parser)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else min(mark.line, text.count("\n")) + 1
        raise _error(origin, line, f"not YAML: {_explain(error, text=text, line=line)}") from None
    except yaml.reader.ReaderError as error:
        line = text.encode(errors="replace")[: error.position].count(b"\n") + 1
        raise _error(
            origin,
            line,
            f"not YAML: a control character ({error.reason}): remove it, or escape it within double quotes",
        ) from None
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise _error(origin, line, "not YAML: half of a surrogate pair: save the file as UTF-8") from None


# libyaml's wording -> what to change
_FIXES = (
    ("mapping values are not allowed", "quote a text that contains ': ', and check the indentation"),
    ("cannot start any token", "quote a text that begins with @, ` or %"),
    ("quoted scalar", "close the quotes, and write a backslash within double quotes twice"),
    ("flow", "close the bracket, or put the missing comma"),
    ("", "check the indentation of this line and the one before"),
)


def _explain(error: yaml.MarkedYAMLError, *, text: str, line: int) -> str:
    problem = error.problem or "the text ends too early"
    if error.context and error.context_mark:
        problem = f"{error.context} that begins on line {error.context_mark.line + 1}, {problem}"
    written = text.split("\n")[line - 1]
    if "\t" in written[: len(written) - len(written.lstrip())]:
        return f"{problem}: replace the tab that indents this line by spaces"
    return f"{problem}: {next(fix for wording, fix in _FIXES if wording in problem)}"


def _error(origin: str, line: int, message: str) -> LoadError:
    return LoadError(f"{origin}:{line}: {message}")


# --- Nodes to data ----------------------------------------------------------------------------------------------------

_TAG_PREFIX = "tag:yaml.org,2002:"
_TAG_TYPES: Mapping[str, type] = {"bool": bool, "int": int, "float": float, "null": type(None), "timestamp": str}


class _Builder:
    """Builds one document and notes on which line each value stands."""

    def __init__(self, *, origin: str) -> None:
        self.origin = origin
        self.lines: dict[Path, int] = {}
        self._seen: set[_Node] = set()
        self._open: set[_Node] = set()
        self._aliased_nodes = 0

    def fail(self, node: _Node, message: str) -> NoReturn:
        raise _error(self.origin, node.line, message)

    def build(self, node: _Node, *, path: Path) -> Any:
        self.lines.setdefault(path, node.line)
        if isinstance(node, _Scalar):
            self._count(node)
            return self._json(node, self._scalar(node))
        if node in self._open:
            self.fail(node, "an anchor's value contains itself: remove the alias inside it")
        self._open.add(node)
        self._count(node)
        built: Any
        if isinstance(node, _Sequence):
            built = [self.build(item, path=(*path, index)) for index, item in enumerate(node.items)]
        else:
            built = self._mapping(node, path=path)
        self._open.remove(node)
        return built

    def _count(self, node: _Node) -> None:
        # Nine lines of aliases to aliases can stand for a billion values.
        if node in self._seen:
            self._aliased_nodes += 1
            if self._aliased_nodes > _MAX_ALIASED_NODES:
                self.fail(node, f"aliases stand for more than {_MAX_ALIASED_NODES:,} values: write fewer of them")
        self._seen.add(node)

    def _mapping(self, node: _Mapping, *, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        written: dict[str, int] = {}
        for key, value in node.pairs:
            if _is_merge(key):
                data.update(self._merged(key, value, written=written, path=path))
                continue
            name = self._key(key)
            if name in written:
                self.fail(key, f'the key "{name}" is already written on line {written[name]}: remove one of the two')
            written[name] = key.line
            if name in data:
                self._forget((*path, name))
            self.lines[*path, name] = key.line
            data[name] = self.build(value, path=(*path, name))
        return data

    def _merged(self, key: _Node, value: _Node, *, written: Mapping[str, int], path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for source in reversed(self._merge_sources(value)):
            merged.update(self.build(source, path=path))
        for name in merged:
            if name in written:
                self.fail(
                    key,
                    f'"<<" merges the key "{name}", already written on line {written[name]}, and kubectl takes the '
                    'merged value: put "<<" before the keys that replace what it merges',
                )
        return merged

    def _forget(self, path: Path) -> None:
        """Drop the lines of a merged value that a key replaces."""
        self.lines = {at: line for at, line in self.lines.items() if at[: len(path)] != path}

    def _merge_sources(self, node: _Node) -> Sequence[_Mapping]:
        # A list is merged where it is written, and not by an alias: it has been built before then.
        sources = node.items if isinstance(node, _Sequence) and node not in self._seen else [node]
        mappings = [source for source in sources if isinstance(source, _Mapping)]
        if len(mappings) != len(sources):
            self.fail(node, '"<<" merges a mapping or a list of mappings, and this is neither: name an anchor of one')
        return mappings

    def _key(self, node: _Node) -> str:
        if not isinstance(node, _Scalar):
            self.fail(node, "a key must be a string, and this is a list or a mapping: quote it")
        match self._scalar(node):
            case str() as key:
                return key
            case bool() as flag:
                return "true" if flag else "false"
            case int() as number if number < 2**63:
                return str(number)
            case float() as number:
                return format_float_key(number)
        self.fail(node, f'"{node.text}" cannot be a key: quote it')

    def _scalar(self, node: _Scalar) -> str | int | float | None:
        if node.tag is None:
            return resolve_plain(node.text) if node.plain else node.text
        kind = node.tag.removeprefix(_TAG_PREFIX)
        if kind == "binary":
            try:
                return base64.b64decode(node.text.replace("\n", ""), validate=True).decode(errors="replace")
            except binascii.Error as error:
                self.fail(node, f"!!binary does not hold base64 ({error}): encode it anew")
        if kind not in _TAG_TYPES:
            return node.text
        value = node.text if kind == "timestamp" else resolve_plain(node.text)
        if kind == "float" and type(value) is int and value < 2**63:
            value = float(value)
        if type(value) is not _TAG_TYPES[kind]:
            self.fail(node, f'"{node.text}" is not what !!{kind} says: change the value or remove the tag')
        return value

    def _json(self, node: _Scalar, value: str | int | float | None) -> Any:
        if not isinstance(value, float):
            return value
        if not math.isfinite(value):
            self.fail(node, f'JSON has no "{node.text}": write a finite number, or quote it to make it a string')
        return to_json_number(value)


def _is_merge(node: _Node) -> bool:
    return isinstance(node, _Scalar) and node.text == "<<" and (node.plain or node.tag == f"{_TAG_PREFIX}merge")


# --- Data to text -----------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Leaves a string unquoted only where every reader takes it for a string."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        for key, _ in node.value:
            if key.style == "|":
                key.style = '"'
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            if value == "<<":
                return f"{_TAG_PREFIX}merge"
            resolved = resolve_plain(value)
            if not isinstance(resolved, str):
                return _TAG_PREFIX + _tag_of(resolved)
        # PyYAML's own rules add what other YAML 1.1 readers see: dates, and 1:30 as a number of minutes.
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]  # untyped in types-PyYAML


def _tag_of(value: float | None) -> str:
    return "null" if value is None else type(value).__name__


# What a block scalar cannot carry: libyaml takes the separators for line breaks and turns them into "\n".
_NOT_IN_BLOCK = re.compile("[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def _represent_str(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = None
    if _NOT_IN_BLOCK.search(value):
        style = '"'
    elif "\n" in value:
        style = "|"
    return dumper.represent_scalar(f"{_TAG_PREFIX}str", value, style=style)


def _represent_int(dumper: _Dumper, value: int) -> yaml.ScalarNode:
    read = resolve_plain(str(value))
    if isinstance(read, str) or value != (to_json_number(read) if isinstance(read, float) else read):
        raise ValueError(f"{value} cannot be written as YAML: beyond 64 bits Go reads a rounded number")
    return dumper.represent_scalar(_TAG_PREFIX + _tag_of(read), str(value))


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written as YAML: JSON has no such number")
    return dumper.represent_scalar(f"{_TAG_PREFIX}float", repr(value).replace("e-0", "e-"))


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(int, _represent_int)
_Dumper.add_representer(float, _represent_float)


def dump_document(data: Mapping[str, Any]) -> str:
    """Return JSON-like `data` as YAML for a person, keys in their order; `load_documents` reads back the same.

    Raises:
        ValueError: a number that the reader would change: not finite, or an integer beyond 64 bits.
        yaml.YAMLError: a value that is not of a JSON type.
    """
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


# --- Assignments ------------------------------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"((?:\\.|[^\\=])*)=(.*)", re.DOTALL)
_NAME = r"(?:\\.|[^\\.\[\]])+"
_PATH = re.compile(rf"{_NAME}(?:\.{_NAME}|\[[0-9]+\])*")
_STEP = re.compile(rf"\[([0-9]+)\]|({_NAME})")


def parse_assignment(text: str) -> tuple[Path, Any]:
    r"""Return path and value of `spec.sft.args.learning_rate=1e-4`.

    A list entry is `datasets[0]` or `datasets.0`; a dot within a key is written `\.`. The value is read as in a file,
    so `on` is true, `[1, 2]` a list, nothing at all is null, and `'"0.5"'` a string.

    Raises:
        LoadError: there is no `=`, the path cannot be read, or the value is not YAML.
    """
    match = _ASSIGNMENT.fullmatch(text)
    if not match:
        raise LoadError(f'--set {text}: there is no "=": write it as spec.sft.args.learning_rate=1e-4')
    written, value = match.groups()
    if not _PATH.fullmatch(written):
        raise LoadError(f'--set {text}: "{written}" is not a path: write it as spec.datasets[0].fraction')
    path = tuple(int(index) if index else re.sub(r"\\(.)", r"\1", name) for index, name in _STEP.findall(written))
    origin = f"--set {written}"
    roots = list(_compose(value, origin=origin))
    if len(roots) > 1:
        raise LoadError(f"{origin}: the value is more than one YAML document: set one value at a time")
    return path, _Builder(origin=origin).build(roots[0], path=()) if roots else None


def apply_assignment(data: Mapping[str, Any], *, path: Path, value: Any) -> dict[str, Any]:
    """Return a copy of `data` with `value` at `path`; mappings on the way are made where there is nothing yet.

    Raises:
        LoadError: an index that its list does not have, or a path that leads through a scalar.
    """
    changed = copy.deepcopy(dict(data))
    parent: Any = changed
    for depth in range(len(path)):
        step = _step_into(parent, path=path, depth=depth)
        if depth == len(path) - 1:
            parent[step] = value
        elif isinstance(parent, dict) and parent.get(step) is None:
            parent[step] = {}
        parent = parent[step]
    return changed


def _step_into(parent: Any, *, path: Path, depth: int) -> str | int:
    """Return the key or index in `parent` that `path[depth]` means."""
    step = path[depth]
    complaint = f"--set {format_path(path)}: {format_path(path[:depth]) or 'the resource'}"
    if isinstance(parent, list):
        if isinstance(step, str) and not step.isdecimal():
            raise LoadError(f"{complaint} is a list: name an entry of it, as in {format_path((*path[:depth], 0))}")
        if int(step) >= len(parent):
            extent = f"ends at [{len(parent) - 1}]" if parent else "is empty"
            raise LoadError(f"{complaint} {extent}, so there is no [{step}]: --set changes entries and adds none")
        return int(step)
    if not isinstance(parent, dict):
        raise LoadError(f"{complaint} is {json.dumps(parent)}, so nothing can be set below it: set the whole value")
    if isinstance(step, int):
        raise LoadError(f"{complaint} is not a list, so there is no [{step}]: name a key of it")
    return step


def format_path(path: Path) -> str:
    """Return `path` as a person writes it: `spec.datasets[0].fraction`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
