"""On which nodes engine pods may run: tolerations, affinity, spreading. Parts of spec.hardware.

As in Kubernetes, without what would show a tenant other namespaces: terms about pods mean those of the LLMServer's own
namespace.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from octavo_operator.fields import LABEL_KEY, Part, Text, config, rule

Values = Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=64)]


class Toleration(Part):
    key: Text | None = Field(None, description="Taint that is tolerated; none with operator Exists means every taint.")
    operator: Literal["Equal", "Exists"] | None = Field(None, description="Default: Equal.")
    value: Text | None = Field(None, description="The taint's value, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect that is tolerated. Default: all of them."
    )
    toleration_seconds: int | None = Field(None, description="How long NoExecute is tolerated. Default: for ever.")


class TopologySpread(Part):
    topology_key: str = Field(
        pattern=LABEL_KEY,
        max_length=317,
        description="Label of nodes whose values are the places: kubernetes.io/hostname, topology.kubernetes.io/zone.",
    )
    max_skew: int = Field(
        1, ge=1, le=100, description="By how many pods the fullest place may exceed the emptiest. Default: 1."
    )
    when_unsatisfiable: Literal["ScheduleAnyway", "DoNotSchedule"] = Field(
        "ScheduleAnyway", description="What is done where that cannot be kept. Default: ScheduleAnyway."
    )


class Requirement(Part):
    model_config = config(
        rule(
            "self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0 : "
            "has(self.values) && size(self.values) > 0",
            "\"the operator \" + self.operator + (self.operator in ['Exists', 'DoesNotExist'] ? "
            '" takes no values: remove them" : " needs values: add at least one")',
            field_path=".values",
        )
    )
    key: str = Field(pattern=LABEL_KEY, max_length=317, description="Label that is asked for.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="How its value is compared; Gt and Lt are for nodes only."
    )
    values: Values | None = Field(None, description="What it is compared with; none with Exists and DoesNotExist.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.operator in ("Exists", "DoesNotExist")) == bool(self.values):
            needs = "takes no values: remove them" if self.values else "needs values: add at least one"
            raise ValueError(f"the operator {self.operator} {needs}")
        return self


class NodeTerm(Part):
    match_expressions: list[Requirement] = Field(
        min_length=1, max_length=16, description="All of these must hold of the node's labels."
    )


class WeightedNodeTerm(Part):
    weight: int = Field(ge=1, le=100, description="How much it counts.")
    preference: NodeTerm = Field(description="What is preferred.")


class NodeTerms(Part):
    node_selector_terms: list[NodeTerm] = Field(
        min_length=1, max_length=16, description="One of these must hold of the node."
    )


class NodeAffinity(Part):
    required_during_scheduling_ignored_during_execution: NodeTerms | None = Field(
        None, description="Nodes that the pods may be given to."
    )
    preferred_during_scheduling_ignored_during_execution: list[WeightedNodeTerm] | None = Field(
        None, max_length=16, description="Nodes that are better than others."
    )


class Selector(Part):
    match_labels: dict[str, Annotated[str, Field(max_length=63)]] | None = Field(
        None, max_length=16, description="Labels that the other pods have."
    )
    match_expressions: list[Requirement] | None = Field(
        None, max_length=16, description="What must hold of the other pods' labels."
    )


class PodTerm(Part):
    label_selector: Selector = Field(description="Which pods of this namespace are meant.")
    topology_key: str = Field(
        pattern=LABEL_KEY, max_length=317, description="Label of nodes; nodes with one value of it are one place."
    )


class WeightedPodTerm(Part):
    weight: int = Field(ge=1, le=100, description="How much it counts.")
    pod_affinity_term: PodTerm = Field(description="What is preferred.")


class PodAffinity(Part):
    required_during_scheduling_ignored_during_execution: list[PodTerm] | None = Field(
        None, max_length=16, description="Must hold."
    )
    preferred_during_scheduling_ignored_during_execution: list[WeightedPodTerm] | None = Field(
        None, max_length=16, description="Is better than not."
    )


class Affinity(Part):
    node_affinity: NodeAffinity | None = Field(None, description="By the labels of nodes.")
    pod_affinity: PodAffinity | None = Field(None, description="Near other pods of this namespace.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Away from other pods of this namespace.")

    def document(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)
