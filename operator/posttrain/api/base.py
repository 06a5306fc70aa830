"""The base classes and scalar types of every resource.

It owns how a resource is spelled (camelCase JSON, nothing unknown, nothing converted silently); it must not know any
particular resource.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from posttrain.api.rules import Rule, broken_rules

GROUP = "posttrain.dev"
VERSION = "v1alpha1"
API_VERSION: Literal["posttrain.dev/v1alpha1"] = "posttrain.dev/v1alpha1"


class ApiModel(BaseModel):
    """A part of a spec: camelCase in JSON, frozen, unknown keys refused.

    The default of a released field never changes: runs that live would be SpecChanged (docs/adr/0011).
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        extra="forbid",
        frozen=True,
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()
    """What must hold between the fields; the CRD has the same rules in CEL."""

    def to_data(self) -> dict[str, Any]:
        """Return the JSON form with defaults written out and unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        broken = broken_rules(self.RULES, self.to_data()) if self.RULES else []
        if broken:
            raise PydanticCustomError(BROKEN_RULE, "{text}", {"text": "; ".join(rule.message for rule in broken)})
        return self


BROKEN_RULE = "broken_rule"
"""Type of the validation error of a broken rule."""


@dataclass(frozen=True)
class Distinct:
    """Marks a list in which nothing stands twice: no scalar, or no two objects with the same `key`."""

    key: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._refuse_repeated, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        kind: dict[str, Any] = {"x-kubernetes-list-type": "set"}
        if self.key is not None:
            kind = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [self.key]}
        return {**handler(schema), **kind}

    def _refuse_repeated(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [value if self.key is None else value.to_data()[self.key] for value in values]
        repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if repeated is not None:
            raise ValueError(f'"{repeated}" is there twice: remove one of the two')
        return values


class StatusModel(BaseModel):
    """A part of a status: every field optional, so that either field manager may write first."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_data(self) -> dict[str, Any]:
        """Return the JSON form without the fields that are not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


_FRACTION = re.compile(r"^(0\.[0-9]*[1-9][0-9]*|1(\.0+)?)$")
_DECIMAL = re.compile(r"^[0-9]{1,12}(\.[0-9]{1,9})?$")
_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")


def _refuse_number(value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'a decimal is a string here: write it quoted, "{value}"')


def _check_fraction(value: object) -> object:
    _refuse_number(value)
    if isinstance(value, str) and not _FRACTION.fullmatch(value):
        raise ValueError(
            f'"{value}" is not a share above 0 and at most 1: write a decimal such as "0.25" '
            '(a dataset\'s fraction is the share of its own rows, so more than "1" does not exist)'
        )
    return value


def _check_decimal(value: object) -> object:
    _refuse_number(value)
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise ValueError(f'"{value}" is not a decimal such as "0.05"')
    return value


def _check_quantity(value: object) -> object:
    _refuse_number(value)
    if isinstance(value, str) and not _QUANTITY.fullmatch(value):
        raise ValueError(f'"{value}" is not a Kubernetes quantity such as "500m", "8" or "64Gi"')
    return value


Fraction = Annotated[
    str,
    BeforeValidator(_check_fraction),
    Field(max_length=20, json_schema_extra={"pattern": _FRACTION.pattern}),
]
"""A share above 0 and at most 1, as a decimal string."""

Decimal = Annotated[
    str,
    BeforeValidator(_check_decimal),
    Field(max_length=22, json_schema_extra={"pattern": _DECIMAL.pattern}),
]
"""A non-negative decimal string: specs hold no floats, which JSON writers round differently."""

Quantity = Annotated[
    str,
    BeforeValidator(_check_quantity),
    Field(max_length=32, json_schema_extra={"pattern": _QUANTITY.pattern}),
]
"""A Kubernetes resource quantity."""

DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
"""An RFC 1035 label: the name of a claim, ConfigMap, Secret or service account."""

RUN_NAME_MAX_LENGTH = 40
"""The longest name of a resource of ours: the names of its children must still be labels."""

RunName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=RUN_NAME_MAX_LENGTH),
]

ObjectName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253),
]
"""An RFC 1123 subdomain: the name of an object that somebody else made."""

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
LongText = Annotated[str, StringConstraints(max_length=65536)]
JsonObject = dict[str, JsonValue]
Time = datetime
