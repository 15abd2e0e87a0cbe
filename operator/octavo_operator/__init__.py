"""Octavo's Kubernetes operator: turns LLMServer resources into running engines and reports what they do."""
