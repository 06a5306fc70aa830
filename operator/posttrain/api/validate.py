"""From parsed YAML to a checked resource, with every problem at once.

It owns how problems are found and worded; it must not read files, nor judge what only the machine or the data can tell.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posttrain.api.base import API_VERSION, BROKEN_RULE, RUN_NAME_MAX_LENGTH, ApiModel
from posttrain.api.grpo_checks import find_grpo_problems
from posttrain.api.loader import Path, format_path
from posttrain.api.methods import METHODS, args_path, coerce_spec, find_args_problems, table_of
from posttrain.api.patterns import explain_pattern
from posttrain.api.rules import Rule
from posttrain.api.schema import Node, child, drop_nulls, fill_defaults, model_in, resource_schema
from posttrain.api.spelling import describe_value, first_sentence, join_names, nearest, plain, write_value
from posttrain.api.training_run import KIND, NAME_RULE, TrainingRun, TrainingRunSpec
from posttrain.errors import InvalidResource, Problem

LineOf = Callable[[Path], int | None]
"""Tells on which line of the text a value is written, such as Document.line_of."""

_FEW = 14

_Found = list[tuple[Path, str]]

# What dataset mixtures call these elsewhere.
_SYNONYMS = {"id": "source", "weight": "fraction"}


def parse_training_run(data: Mapping[str, Any], *, origin: str = "", line_of: LineOf | None = None) -> TrainingRun:
    """Return the TrainingRun in `data`, its `args` checked and coerced.

    Raises:
        InvalidResource: with every problem that can be seen in the resource itself, in the order of their lines where
            `line_of` knows them.
    """
    checked = check_training_run(data, line_of=line_of)
    if checked.run is None or checked.problems:
        raise InvalidResource(checked.problems, origin=origin)
    return checked.run


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A resource after its checks."""

    run: TrainingRun | None
    """The run, its `args` coerced. Where there are problems: what is left without the values that are wrong, to look
    for problems of other kinds in; None where nothing valid is left."""
    problems: tuple[Problem, ...]
    doubtful: tuple[str, ...]
    """Paths of the values that are wrong: nothing can be said of what `run` has in their place."""

    def is_in_doubt(self, path: str) -> bool:
        """Tell whether what is at a path may come from a value that is wrong."""
        return any(f"{path}.".startswith((f"{doubt}.", f"{doubt}[")) for doubt in self.doubtful)


def check_training_run(data: Mapping[str, Any], *, line_of: LineOf | None = None) -> Checked:
    """Return the TrainingRun in `data` with every problem that can be seen in the resource itself."""
    run, found, doubtful = _check(data)
    if found:
        rest = copy.deepcopy(dict(data))
        for path, _ in found:
            _remove(rest, path)
        run, left, _ = _check(rest)
        run = None if left else run
    return Checked(
        run=None if run is None else run.model_copy(update={"spec": coerce_spec(run.spec)}),
        problems=_in_order(found, line_of=line_of),
        doubtful=tuple(format_path(path) for path in doubtful),
    )


def _check(data: Mapping[str, Any]) -> tuple[TrainingRun | None, _Found, list[Path]]:
    """Return the run, where the schema takes it, what is wrong with it, and the paths of what is in doubt."""
    found = _wrong_type_of_resource(data)
    if any(path == ("kind",) for path, _ in found):
        return None, found, []
    sent = drop_nulls(dict(data), resource_schema())
    run = None
    errors: list[ErrorDetails] = []
    try:
        # Python's own spelling of the names is not the API's: num_nodes is as unknown as any typo.
        run = TrainingRun.model_validate_json(json.dumps(sent), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        errors = [item for item in error.errors() if not _is_consequence(item)]
    found += [(_path_of(item), _explain(item)) for item in errors if _path_of(item) not in {p for p, _ in found}]
    doubtful = [_meant_path(item) for item in errors]
    broken = _broken_rules(sent, doubtful=doubtful)
    wrong_args = _wrong_args(sent)
    found += [*broken, *wrong_args]
    if run is not None and not wrong_args:
        found += find_grpo_problems(run.spec)
    # What a wrong argument should have been, the others may depend on.
    return run, found, [*doubtful, *(path for path, _ in broken), *(path[:3] for path, _ in wrong_args)]


def _remove(data: dict[str, Any], path: Path) -> None:
    """Take out the value at a path; an entry of a list stays, so that the others keep their places."""
    parent: Any = data
    for step in path[:-1]:
        inside = isinstance(step, int) and isinstance(parent, list) and step < len(parent)
        if not inside and not (isinstance(parent, dict) and step in parent):
            return
        parent = parent[step]
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _is_consequence(error: ErrorDetails) -> bool:
    """Tell whether an error is told otherwise: a broken rule, or a list that only lacks entries that are wrong."""
    if error["type"] == "too_short":
        return len(error["input"]) >= int(error["ctx"]["min_length"])
    return error["type"] == BROKEN_RULE


def _in_order(found: _Found, *, line_of: LineOf | None) -> tuple[Problem, ...]:
    problems = [Problem(path=format_path(path), message=text, line=_line(path, line_of)) for path, text in found]
    return tuple(sorted(problems, key=lambda problem: problem.line or 0))


def _line(path: Path, line_of: LineOf | None) -> int | None:
    """Return the line of the value, or of the nearest thing around it that is written at all."""
    if line_of is None:
        return None
    return next((line for end in range(len(path), -1, -1) if (line := line_of(path[:end])) is not None), None)


def _wrong_type_of_resource(data: Mapping[str, Any]) -> _Found:
    found: _Found = []
    for key, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        value = data.get(key)
        if value is None:
            found.append(((key,), f"missing field: write {key}: {expected}"))
        elif value != expected:
            found.append(((key,), f"must be {expected}, not {describe_value(value)}"))
    return found


# --- Single fields ----------------------------------------------------------------------------------------------------


def _path_of(error: ErrorDetails) -> Path:
    return tuple(step for step in error["loc"] if step != "[key]")


def _node_at(path: Path) -> Node:
    """Return the schema at a path; an empty one within free-form objects and below unknown fields."""
    node: Node = resource_schema()
    for step in path:
        node = (node.get("items") if isinstance(step, int) else child(node, step)) or {}
    return node


def _explain(error: ErrorDetails) -> str:
    path, value, kind, limits = _path_of(error), error["input"], error["type"], error.get("ctx", {})
    node = _node_at(path)
    match kind:
        case "missing":
            return _explain_missing(path)
        case "extra_forbidden":
            return _explain_unknown(path)
        case "value_error":
            return str(limits["error"])
        case "string_pattern_mismatch" | "string_too_short" | "string_too_long" if path == ("metadata", "name"):
            return explain_name(value)
        case "string_pattern_mismatch":
            return explain_pattern(node["pattern"], value)
        case "string_too_long":
            return f"has {len(value)} characters, and at most {limits['max_length']} are allowed: shorten it"
        case "string_too_short":
            return f"is empty: write {_example_or_words(node)}, or leave the field out"
        case "too_long":
            return f"has {len(value)} entries, and at most {limits['max_length']} are allowed: remove some"
        case "too_short":
            return f"is empty: at least {limits['min_length']} is needed, for example {_example_or_words(node)}"
    return f"must be {_expected(node)}, not {describe_value(value)}{_hint(node, value)}"


def explain_name(name: str) -> str:
    """Return why a resource's name is refused, and one that would do."""
    fitting = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:RUN_NAME_MAX_LENGTH].rstrip("-")
    return NAME_RULE + (f"; {write_value(fitting)} would do" if fitting else "")


def _explain_missing(path: Path) -> str:
    node = _node_at(path)
    name = path[-1]
    if path[:1] == ("metadata",):
        return 'missing field: write the run\'s name, for example metadata: {"name": "my-run"}'
    about = first_sentence(node["description"]) if "description" in node else ""
    example = f" For example {name}: {write_value(node['examples'][0])}" if "examples" in node else ""
    return f"missing field: {about}{example}".removesuffix(" ")


def _explain_unknown(path: Path) -> str:
    key = str(path[-1])
    around = _node_at(path[:-1])
    names = list(around.get("properties", {}))
    near = nearest(_SYNONYMS.get(key, key), names)
    places = [] if near else _places_of(key)
    parts = ["unknown field"]
    if near is not None:
        parts.append(f", did you mean `{near}`?")
    elif places:
        parts.append(f", did you mean `{places[0]}`?")
    else:
        parts += _explain_key_of_args(key)
    if not places and len(names) <= _FEW:
        parts.append(f"{' Valid' if near else '; valid'} here: {join_names(names)}")
    elif len(parts) == 1:
        parts.append(f"; `posttrain explain {format_path(path[:-1]) or KIND}` lists the valid ones")
    return "".join(parts)


def _explain_key_of_args(key: str) -> list[str]:
    """Return where a key of a trainer's arguments belongs; nothing for other names."""
    tables = {method: table_of(method) for method in METHODS}
    homes = [method for method, table in tables.items() if key in table.keys]
    if homes:
        classes = join_names([tables[method].class_name for method in homes])
        places = join_names([f"`{'.'.join(args_path(method))}.{key}`" for method in homes], conjunction="or")
        return [f": it is a key of {classes}, write it as {places}"]
    return [f": {table.elsewhere[key]}" for table in tables.values() if key in table.elsewhere][:1]


def _places_of(key: str) -> list[str]:
    """Return the paths in the spec at which a field of that name exists."""

    def search(node: Node, path: str) -> Iterator[str]:
        for name, part in node.get("properties", {}).items():
            if plain(name) == plain(key):
                yield f"{path}.{name}"
            yield from search(part, f"{path}.{name}")
        if "items" in node:
            yield from search(node["items"], f"{path}[]")

    return sorted(search(_node_at(("spec",)), "spec"), key=lambda path: path.count("."))


def _meant_path(error: ErrorDetails) -> Path:
    """Return the path of the field whose value is in doubt: for an unknown field, the one that it probably means."""
    path = _path_of(error)
    if error["type"] != "extra_forbidden":
        return path
    near = nearest(str(path[-1]), _node_at(path[:-1]).get("properties", {}))
    return (*path[:-1], near) if near else path


def _expected(node: Node) -> str:
    """Return what a field takes, in words."""
    if "enum" in node:
        values = [str(value) for value in node["enum"]]
        return values[0] if len(values) == 1 else f"one of {join_names(values, conjunction='or')}"
    match node.get("type"):
        case "integer":
            low, high = node.get("minimum"), node.get("maximum")
            return f"an integer from {low} to {high}" if high is not None else "an integer"
        case "boolean":
            return "true or false"
        case "string":
            return "a string"
        case "array":
            return "a list"
    names = list(node.get("properties", {}))
    return f"a mapping with the keys {join_names(names)}" if 0 < len(names) <= _FEW else "a mapping"


def _example_or_words(node: Node) -> str:
    return write_value(node["examples"][0]) if "examples" in node else _expected(node)


def _hint(node: Node, value: Any) -> str:
    """Return what to change, where the likely slip is known."""
    kind, choices = node.get("type"), [str(choice) for choice in node.get("enum", [])]
    if choices:
        near = nearest(str(value), choices) if isinstance(value, str) else None
        return f": did you mean {near}?" if near else ""
    if isinstance(value, str) and (
        (kind == "integer" and re.fullmatch(r"-?[0-9]+", value)) or (kind == "boolean" and value in {"true", "false"})
    ):
        return ": write it without quotes"
    if kind == "string" and isinstance(value, bool | int | float):
        return ": write it in quotes"
    if kind == "array":
        return ": put a hyphen before each entry"
    return ""


# --- Several fields ---------------------------------------------------------------------------------------------------


def _broken_rules(data: Mapping[str, Any], *, doubtful: list[Path]) -> _Found:
    """Return the broken rules; one that looks at a field whose value is in doubt is passed over."""
    spec = fill_defaults(data.get("spec"), _node_at(("spec",)))
    return [
        ((*path, *(rule.field.split(".") if rule.field else ())), rule.message)
        for model, part, path in _objects(TrainingRunSpec, spec, path=("spec",))
        for rule in model.RULES
        if not _reads_any(rule, path=path, doubtful=doubtful) and not rule.holds(part)
    ]


def _reads_any(rule: Rule, *, path: Path, doubtful: list[Path]) -> bool:
    reads = [(*path, *read.split(".")) for read in rule.reads]
    return any(read[: len(doubt)] == doubt for read in reads for doubt in doubtful)


def _objects(
    model: type[ApiModel], data: Any, *, path: Path
) -> Iterator[tuple[type[ApiModel], Mapping[str, Any], Path]]:
    """Yield every object in `data` with its model."""
    if not isinstance(data, dict):
        return
    yield model, data, path
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = model_in(field.annotation)
        if inner is None or key not in data:
            continue
        if isinstance(data[key], list):
            for index, item in enumerate(data[key]):
                yield from _objects(inner, item, path=(*path, key, index))
        else:
            yield from _objects(inner, data[key], path=(*path, key))


def _wrong_args(data: Mapping[str, Any]) -> _Found:
    spec = data.get("spec")
    if not isinstance(spec, dict):
        return []
    wrong: _Found = list(find_args_problems(spec))
    for method in METHODS:
        asked = spec.get(method)
        args = asked.get("args") if isinstance(asked, dict) else None
        strategy = args.get("eval_strategy") if isinstance(args, dict) else None
        if strategy in {"steps", "epoch"} and not spec.get("evalDatasets") and not spec.get("testFraction"):
            message = f'"{strategy}" needs held-out data, and none is named: set spec.evalDatasets or spec.testFraction'
            wrong.append(((*args_path(method), "eval_strategy"), message))
    return wrong
