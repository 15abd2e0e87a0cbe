"""Fixtures of the end-to-end tests: a cluster of their own, as they install the chart, and the images on its node."""

from __future__ import annotations

from fixtures import cluster, loaded_images

__all__ = ["cluster", "loaded_images"]
