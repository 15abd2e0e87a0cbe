"""spec.autoscaling of the resource: who decides how many replicas there are, and by what. A part of spec.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from octavo_operator.fields import Part, config, rule, without_effect

HPA_LONGEST = 3600
"""Seconds of an HPA's stabilization, bounded by its API."""


_IDLE = (
    "autoscaling.idleSeconds is for servers that may go to zero: set autoscaling.minReplicas to 0, or remove "
    "idleSeconds"
)


class Target(Part):
    """How busy a replica should be. The busiest of these counts."""

    queue_seconds: int = Field(
        2, ge=1, le=600, description="How long a new request would wait, as the scheduler predicts it. Default: 2."
    )
    kv_usage_percent: int = Field(85, ge=10, le=100, description="Share of the KV cache in use. Default: 85.")
    running: int | None = Field(
        None, ge=1, le=65536, description="Requests computed at once by a replica. Default: it does not count."
    )


class Autoscaling(Part):
    """Who decides how many replicas there are. Leave spec.replicas out of what GitOps applies: it is their result."""

    model_config = config(
        rule(
            "(has(self.minReplicas) ? self.minReplicas : 1) <= self.maxReplicas",
            "'autoscaling.minReplicas must not be above autoscaling.maxReplicas: raise the second or lower the first'",
            field_path=".minReplicas",
        ),
        rule(
            "!has(self.minReplicas) || self.minReplicas > 0 || !has(self.mode) || self.mode != 'HPA'",
            "'autoscaling.minReplicas is 0, which an HPA cannot do: set 1, or mode BuiltIn'",
            field_path=".minReplicas",
        ),
        rule(
            "(has(self.mode) && self.mode == 'KEDA') == has(self.prometheusAddress)",
            "'autoscaling.prometheusAddress belongs to mode KEDA, which needs it: set it there, and nowhere else'",
            field_path=".prometheusAddress",
        ),
        rule(
            f"!has(self.mode) || self.mode == 'BuiltIn' || !has(self.scaleDownDelaySeconds) || "
            f"self.scaleDownDelaySeconds <= {HPA_LONGEST}",
            f"'autoscaling.scaleDownDelaySeconds is above {HPA_LONGEST}, the most that an HPA takes, and KEDA makes "
            "one: lower it, or set mode BuiltIn'",
            field_path=".scaleDownDelaySeconds",
        ),
        rule(
            "!has(self.idleSeconds) || (has(self.minReplicas) && self.minReplicas == 0)",
            f"'{_IDLE}'",
            field_path=".idleSeconds",
        ),
    )

    mode: Literal["BuiltIn", "HPA", "KEDA"] = Field(
        "BuiltIn",
        description="BuiltIn: the operator asks the engines and scales by their own prediction; nothing else is "
        "needed. HPA: a HorizontalPodAutoscaler over metrics of an adapter. KEDA: a ScaledObject over Prometheus. To "
        "scale by something else, leave autoscaling out and let it write to the scale subresource. Default: BuiltIn.",
    )
    min_replicas: int = Field(
        1,
        ge=0,
        le=1000,
        description="Fewest replicas; 0 takes the last one away when nobody asks, and the activator holds the "
        "next requests until one is back. The condition Wakeable says whether it can. Default: 1.",
    )
    max_replicas: int = Field(ge=1, le=1000, description="Most replicas.")
    target: Target = Field(Target(), description="How busy a replica should be. The busiest of these counts.")
    scale_down_delay_seconds: int = Field(
        300,
        ge=0,
        le=86400,
        description="How long fewer replicas must have been enough before there are fewer. Default: 300.",
    )
    idle_seconds: int = Field(
        600,
        ge=10,
        le=86400,
        description="With minReplicas 0: how long no request may have come before the last one goes. Default: 600.",
    )
    prometheus_address: str | None = Field(
        None, pattern=r"^https?://[^ ]+$", max_length=512, description="For KEDA: where it finds Prometheus."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                "autoscaling.minReplicas must not be above autoscaling.maxReplicas: raise the second or lower the first"
            )
        if self.mode == "HPA" and self.min_replicas == 0:
            raise ValueError("autoscaling.minReplicas is 0, which an HPA cannot do: set 1, or mode BuiltIn")
        if (self.mode == "KEDA") != (self.prometheus_address is not None):
            raise ValueError(
                "autoscaling.prometheusAddress belongs to mode KEDA, which needs it: set it there, and nowhere else"
            )
        if self.mode != "BuiltIn" and self.scale_down_delay_seconds > HPA_LONGEST:
            raise ValueError(
                f"autoscaling.scaleDownDelaySeconds is above {HPA_LONGEST}, the most that an HPA takes, and KEDA makes "
                "one: lower it, or set mode BuiltIn"
            )
        return self

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        if "idle_seconds" in self.model_fields_set and self.min_replicas > 0:
            without_effect(info, _IDLE)
        return self
