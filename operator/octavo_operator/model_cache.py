"""Where a downloaded model is kept: spec.cache. The engine's store makes sure that it is whole; here is the disk."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from octavo_operator.fields import DNS_SUBDOMAIN, QUANTITY, Part, config, rule
from octavo_operator.quantity import parse_quantity

_OWN_CLAIM = "(has(self.mode) && self.mode == 'Shared' && !has(self.claimName))"
_PER_REPLICA = "(!has(self.mode) || self.mode == 'PerReplica')"


class ModelCache(Part):
    """Where a downloaded model is kept. Only for sources that are downloaded: hf:// and s3://."""

    model_config = config(
        rule(
            f"!has(self.claimName) || !{_PER_REPLICA}",
            '"cache.claimName is \'" + self.claimName + "\', but with mode PerReplica every pod has a disk of its own: '
            'set cache.mode to Shared or NodeLocal, or remove claimName"',
            field_path=".claimName",
        ),
        rule(
            "!has(self.mode) || self.mode != 'NodeLocal' || has(self.claimName)",
            "'cache.mode NodeLocal needs cache.claimName: a claim whose volume is a folder of each node'",
        ),
        rule(
            f"!{_OWN_CLAIM} || has(self.size)",
            "'cache.mode Shared needs cache.size for the claim that is made, or cache.claimName of one that exists'",
        ),
        rule(
            f"!has(self.storageClassName) || {_OWN_CLAIM} || ({_PER_REPLICA} && has(self.size))",
            '"cache.storageClassName is \'" + self.storageClassName + "\', but no claim is made: set cache.size and '
            "leave "
            'cache.claimName out"',
            field_path=".storageClassName",
        ),
        rule(
            f"!has(self.deletionPolicy) || {_OWN_CLAIM}",
            "'cache.deletionPolicy is about a claim that is made: set cache.mode to Shared and leave cache.claimName "
            "out'",
            field_path=".deletionPolicy",
        ),
        rule(
            "!has(self.prefetch) || !self.prefetch || (has(self.mode) && self.mode == 'Shared')",
            "'cache.prefetch fills one disk before the pods start: set cache.mode to Shared'",
            field_path=".prefetch",
        ),
        rule(
            "!(has(self.mode) && self.mode == 'Shared' && has(oldSelf.mode) && oldSelf.mode == 'Shared' && "
            "!has(self.claimName) && !has(oldSelf.claimName)) || "
            "(has(self.storageClassName) ? self.storageClassName : '') == "
            "(has(oldSelf.storageClassName) ? oldSelf.storageClassName : '')",
            "'cache.storageClassName cannot change, as the claim cannot: set cache.claimName to another claim'",
            field_path=".storageClassName",
        ),
        rule(
            "!(has(self.mode) && self.mode == 'Shared' && has(oldSelf.mode) && oldSelf.mode == 'Shared' && "
            "!has(self.claimName) && !has(oldSelf.claimName) && has(self.size) && has(oldSelf.size)) || "
            "quantity(self.size).compareTo(quantity(oldSelf.size)) >= 0",
            '"cache.size is " + self.size + ", but a claim cannot shrink: it was " + oldSelf.size',
            field_path=".size",
        ),
    )

    mode: Literal["PerReplica", "Shared", "NodeLocal"] = Field(
        "PerReplica",
        description="PerReplica: each pod downloads onto a disk of its own, which goes with it. Shared: one "
        "ReadWriteMany claim for all pods; one downloads, the others wait for it. NodeLocal: claimName's volume is a "
        "folder of each node (a PersistentVolume without node affinity), which its pods share. Default: PerReplica.",
    )
    claim_name: str | None = Field(
        None,
        pattern=DNS_SUBDOMAIN,
        max_length=253,
        description="A PersistentVolumeClaim that exists, which other LLMServers may use too. Default with Shared: one "
        "is made, named like the LLMServer.",
    )
    size: str | None = Field(
        None,
        pattern=QUANTITY,
        max_length=32,
        description="Room for models (60Gi): the size of a claim that is made, and what the store keeps to: beyond it, "
        "models that nobody uses are removed, those unused for longest first. Can grow, not shrink, where a claim was "
        "made. Default: what the disk holds.",
    )
    storage_class_name: str | None = Field(
        None,
        max_length=253,
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$",
        description="StorageClass of a claim that is made; Shared needs one that offers ReadWriteMany. Cannot change. "
        'Default: the cluster\'s; "" takes a volume without a class.',
    )
    prefetch: bool = Field(
        False,
        description="A Job downloads the model before pods start, so that no GPU waits for the network; a new model or "
        "revision is downloaded while pods of the one before go on. Needs Shared. Default: false.",
    )
    deletion_policy: Literal["Delete", "Retain"] = Field(
        "Delete", description="What becomes of the claim that was made when the LLMServer goes. Default: Delete."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.claim_name is not None and self.mode == "PerReplica":
            raise ValueError(
                f"cache.claimName is '{self.claim_name}', but with mode PerReplica every pod has a disk of its own: "
                "set "
                "cache.mode to Shared or NodeLocal, or remove claimName"
            )
        if self.mode == "NodeLocal" and self.claim_name is None:
            raise ValueError(
                "cache.mode NodeLocal needs cache.claimName: a claim whose volume is a folder of each node"
            )
        if self.makes_claim and self.size is None:
            raise ValueError(
                "cache.mode Shared needs cache.size for the claim that is made, or cache.claimName of one that exists"
            )
        per_pod = self.mode == "PerReplica" and self.size is not None
        if self.storage_class_name is not None and not (self.makes_claim or per_pod):
            raise ValueError(
                f"cache.storageClassName is '{self.storage_class_name}', but no claim is made: set cache.size and "
                "leave "
                "cache.claimName out"
            )
        if "deletion_policy" in self.model_fields_set and not self.makes_claim:
            raise ValueError(
                "cache.deletionPolicy is about a claim that is made: set cache.mode to Shared and leave "
                "cache.claimName "
                "out"
            )
        if self.prefetch and self.mode != "Shared":
            raise ValueError("cache.prefetch fills one disk before the pods start: set cache.mode to Shared")
        return self

    @property
    def makes_claim(self) -> bool:
        return self.mode == "Shared" and self.claim_name is None

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else int(parse_quantity(self.size))
