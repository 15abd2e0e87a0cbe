"""What is served and where it comes from: spec.model."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from octavo_operator.fields import DNS_SUBDOMAIN, SECRET_KEY, Part, config, rule

MODELS_PATH = "/models"
HF_SOURCE = "^hf://[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
PVC_SOURCE = "^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$"
OCI_SOURCE = (
    "^oci://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[A-Za-z0-9][A-Za-z0-9._-]*)+(:[A-Za-z0-9_][A-Za-z0-9._-]*)?"
    "(@sha256:[0-9a-f]{64})?(#[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*)?$"
)
S3_SOURCE = "^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)*$"
FILE_SOURCE = "^file://(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$"
SOURCES = {
    HF_SOURCE: "hf://org/name (a model on Hugging Face)",
    S3_SOURCE: "s3://bucket/folder",
    PVC_SOURCE: "pvc://claim/path (a folder on a PersistentVolumeClaim)",
    OCI_SOURCE: "oci://registry/repository:tag#folder (a folder in an image)",
    FILE_SOURCE: "file:///path (a folder in the engine's image)",
}
EXPECTED_SOURCE = ", ".join(list(SOURCES.values())[:-1]) + " or " + list(SOURCES.values())[-1]


class SecretRef(Part):
    """Names only: the kubelet resolves them in the server's namespace, the operator never reads a secret."""

    name: str = Field(
        pattern=DNS_SUBDOMAIN, max_length=253, description="Name of a Secret in the same namespace as the LLMServer."
    )


class TokenSecretRef(SecretRef):
    key: str = Field("token", pattern=SECRET_KEY, max_length=253, description="Key in the Secret. Default: token.")


class S3(Part):
    """How a bucket is reached; without a Secret, as a public one."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._/-]*)?$",
        max_length=512,
        description="Address of a service that speaks S3, such as MinIO. Default: Amazon's of the region.",
    )
    region: str | None = Field(
        None, pattern=r"^[a-z0-9-]+$", max_length=64, description="Region of the bucket. Default: us-east-1."
    )
    secret_ref: SecretRef | None = Field(
        None,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where "
        "there "
        "is one.",
    )


class Model(Part):
    """What is served."""

    model_config = config(
        rule(
            " || ".join(f"self.source.matches('{pattern}')" for pattern in SOURCES),
            f'"model.source is \'" + self.source + "\', expected {EXPECTED_SOURCE}"',
            field_path=".source",
        ),
        rule(
            "!has(self.revision) || self.source.startsWith('hf://')",
            '"model.revision is \'" + self.revision + "\', but only hf:// sources have revisions: remove it, or put '
            'the revision into the source (a folder of a pvc://, a tag or digest of an oci://)"',
            field_path=".revision",
        ),
        rule(
            "!has(self.tokenSecretRef) || self.source.startsWith('hf://')",
            '"model.tokenSecretRef names \'" + self.tokenSecretRef.name + "\', but only hf:// sources take a token: '
            'remove it"',
            field_path=".tokenSecretRef",
        ),
        rule(
            "!has(self.s3) || self.source.startsWith('s3://')",
            '"model.s3 is for s3:// sources, and model.source is \'" + self.source + "\': remove s3"',
            field_path=".s3",
        ),
    )

    source: str = Field(
        max_length=512,
        description="Where the model is, a folder with config.json, tokenizer.json and safetensors files: hf://org/"
        "name on Hugging Face; s3://bucket/folder in S3 or what speaks like it; pvc://claim/path on a "
        "PersistentVolumeClaim, which is mounted read-only; "
        "oci://registry/repository:tag#folder in an image, which the kubelet pulls and mounts (the cluster must have "
        "Kubernetes' ImageVolume); file:///path in the engine's own image.",
    )
    revision: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$",
        max_length=256,
        description="Branch, tag or commit of an hf:// model; a commit makes restarts repeatable. Default: main.",
    )
    served_names: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Names by which clients ask for the model; the first one is reported. Default: the LLMServer's "
        "own name.",
    )
    token_secret_ref: TokenSecretRef | None = Field(
        None, description="Secret with a Hugging Face token, for gated and private models."
    )

    s3: S3 | None = Field(None, description="How an s3:// source is reached.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(re.fullmatch(pattern, self.source) for pattern in SOURCES):
            raise ValueError(f"model.source is '{self.source}', expected {EXPECTED_SOURCE}")
        if len(set(self.served_names or ())) < len(self.served_names or ()):
            raise ValueError(f"model.servedNames has a name twice: {', '.join(self.served_names or ())}")
        if self.revision is not None and self.scheme != "hf":
            raise ValueError(f"model.revision is '{self.revision}', but only hf:// sources have revisions: remove it")
        if self.token_secret_ref is not None and self.scheme != "hf":
            raise ValueError(
                f"model.tokenSecretRef names '{self.token_secret_ref.name}', but only hf:// sources take a token: "
                "remove it"
            )
        if self.s3 is not None and self.scheme != "s3":
            raise ValueError(f"model.s3 is for s3:// sources, and model.source is '{self.source}': remove s3")
        return self

    @property
    def scheme(self) -> str:
        return self.source.partition("://")[0]

    @property
    def _rest(self) -> str:
        return self.source.partition("://")[2]

    @property
    def claim(self) -> str | None:
        """The PersistentVolumeClaim of a pvc:// source."""
        return self._rest.partition("/")[0] if self.scheme == "pvc" else None

    @property
    def image(self) -> str | None:
        """The image of an oci:// source."""
        return self._rest.partition("#")[0] if self.scheme == "oci" else None

    @property
    def is_downloaded(self) -> bool:
        """Whether the engine fetches it over the network; else all that it needs is in its file system."""
        return self.scheme in ("hf", "s3")

    @property
    def location(self) -> str:
        """What the engine is told: an id, or a folder inside the container."""
        match self.scheme:
            case "pvc":
                path = self._rest.partition("/")[2]
            case "oci":
                path = self._rest.partition("#")[2]
            case "s3":
                return self.source
            case _:  # an id; or a path in the image, with its slash
                return self._rest
        return f"{MODELS_PATH}/{path}" if path else MODELS_PATH
