"""What the models of the LLMServer's parts are made of: the base, CEL rules, and types with Kubernetes' patterns.

Used by spec.py and the files of its parts; no part of the resource is defined here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationInfo
from pydantic.alias_generators import to_camel

from octavo_operator.quantity import parse_quantity

QUANTITY = r"^[0-9]+(\.[0-9]+)?([MGTPE]i?|Ki|k|m)?$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
SECRET_KEY = r"^[-._a-zA-Z0-9]+$"
IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"


class Part(BaseModel):
    """A part of the resource: camelCase outside, nothing unknown is taken, and it never changes."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


def rule(expression: str, message: str, *, field_path: str | None = None) -> dict[str, JsonValue]:
    """One CEL rule. `message` is CEL too: a string expression, so that it can quote the value."""
    made: dict[str, JsonValue] = {"rule": expression, "messageExpression": message}
    return made | ({"fieldPath": field_path} if field_path else {})


def rules(*made: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {"x-kubernetes-validations": [*made]}


def config(*made: dict[str, JsonValue], **more: JsonValue) -> ConfigDict:
    """Of a part: its rules, and more keywords of its schema."""
    return ConfigDict(json_schema_extra={**(rules(*made) if made else {}), **more})


def without_effect(info: ValidationInfo, sentence: str) -> None:
    """Notes a field that does nothing beside the others that are there; the sentence says what would be right.

    A CEL rule with the same sentence keeps new ones out. Those that were stored before there was the rule stay, and the
    API server takes every change that leaves them alone; so must the operator, or a new version of it would no longer
    look after them. It passes a list as the validation's context, and tells what comes into it as a condition. Without
    a list, as for a manifest that is yet to be applied, the sentence is an error.
    """
    if info.context is None:
        raise ValueError(sentence)
    info.context.append(sentence)


KEEPS_UNKNOWN: dict[str, JsonValue] = {"x-kubernetes-preserve-unknown-fields": True}
"""The API server leaves unknown fields in the object instead of dropping them without a word; the parser refuses them
by name, so that nobody believes that a field works which does nothing."""


def _quantity(value: str | int) -> str | int:
    parse_quantity(value)
    return value


Quantity = Annotated[
    str | int,
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": QUANTITY, "maxLength": 32}),
    AfterValidator(_quantity),
]
"""An amount as Kubernetes writes it: 4Gi, 500m, 2."""
Text = Annotated[str, Field(max_length=256)]


class Resources(Part):
    requests: dict[str, Quantity] | None = Field(
        None, max_length=16, description="What the scheduler sets aside for each pod, beside the GPUs."
    )
    limits: dict[str, Quantity] | None = Field(
        None, max_length=16, description="What each pod may use at most, beside the GPUs."
    )

    def document(self) -> dict[str, dict[str, str]]:
        """As a container has it."""
        given = self.model_dump(exclude_none=True)
        return {kind: {name: str(amount) for name, amount in given[kind].items()} for kind in sorted(given)}
