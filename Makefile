# Everything that people and CI run. `make` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CACHE  ?= $(or $(OCTAVO_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/octavo)
VENV   ?= $(CACHE)/venv
PYTHON ?= $(VENV)/bin/python
CLUSTER_TOOL = python3 tests/cluster/cluster.py

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: help
