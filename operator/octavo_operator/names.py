"""Constants of the operator: the API group, labels, condition types and reasons. No logic."""

from __future__ import annotations

from typing import NewType

GROUP = "octavo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "LLMServer"
PLURAL = "llmservers"
FIELD_MANAGER = "octavo-operator"
"""The one name under which everything is applied; a second name would split the ownership of fields."""
LEASE = "octavo-operator"

Namespace = NewType("Namespace", str)
Name = NewType("Name", str)
Key = tuple[Namespace, Name]

SERVER_LABEL = "octavo.dev/server"
"""On every child and pod: the server's name. The Deployment's selector, so it can never change."""
REVISION_LABEL = "octavo.dev/revision"
"""On pods: a digest of the pod template, which tells today's pods from yesterday's."""
PREFETCH_LABEL = "octavo.dev/prefetch"
"""On the pods of a Job that downloads a model: the server's name. They are no replicas, so they lack SERVER_LABEL."""
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "octavo-operator"
APPLIED_ANNOTATION = "octavo.dev/applied"
"""On children: a digest of what was applied. It differs when a field was taken away, which a comparison cannot see."""

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
SLICE_MANAGED_BY_LABEL = "endpointslice.kubernetes.io/managed-by"
ACTIVATOR_PORT_LABEL = "octavo.dev/activator-port"
"""On the EndpointSlice by which a Service leads to the activator: the port that stands for the server there."""

RESTART_ANNOTATION = "octavo.dev/restart"
"""On pods: spec.restart.id, so that a new one makes new pods."""

ASKED_ANNOTATION = "octavo.dev/asked"
"""On the Deployment: a digest of the spec that its pod template was made for. It tells a change that somebody asked for
from one that came with another operator."""
DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"

ENGINE_CONTAINER = "engine"
API_PORT_NAME = "http"
MANAGEMENT_PORT_NAME = "management"

# Condition types. Ready is derived from the pods; Unknown is an honest value of each of them.
READY = "Ready"
PROGRESSING = "Progressing"
FITS = "Fits"
MODEL_CACHED = "ModelCached"
SCHEDULABLE = "Schedulable"
VERIFIED = "Verified"
UPDATE_AVAILABLE = "UpdateAvailable"
MONITORING_READY = "MonitoringReady"
WAKEABLE = "Wakeable"
"""Only of servers that may go to zero."""

# Phases, a one-word summary of the conditions for people; nothing is decided by them.
PENDING = "Pending"
DOWNLOADING = "Downloading"
LOADING = "Loading"
SERVING = "Ready"
DEGRADED = "Degraded"
DRAINING = "Draining"
SUSPENDED = "Suspended"
ASLEEP = "Asleep"
FAILED = "Failed"
PHASES = (PENDING, DOWNLOADING, LOADING, SERVING, DEGRADED, DRAINING, SUSPENDED, ASLEEP, FAILED)

# Stages of a pod that has no engine to ask; the others are octavo_engine.status.Stage.
POD_PENDING = "pending"
POD_CREATING = "creating"
POD_CRASHED = "crashed"
POD_UNREACHABLE = "unreachable"
POD_TERMINATING = "terminating"
