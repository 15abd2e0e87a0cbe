# Everything that people and CI run. `make` lists it.
#
# Nothing is installed into the system but Debian packages for the test cluster (as root, through apt). Python
# packages, built programs, images and the test model live in one cache outside the checkout, which checkouts share.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export OCTAVO_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/octavo
# A Python 3.11 to 3.13; the first that is found. Set BASE_PYTHON to choose another.
BASE_PYTHON := $(or $(BASE_PYTHON),$(shell tests/find-python))
VENV   := $(or $(VENV),$(OCTAVO_CACHE)/venv-$(shell $(BASE_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
PYTHON  = $(VENV)/bin/python
CLUSTER = $(BASE_PYTHON) tests/cluster/cluster.py
TEST_PROGRAMS = k8s etcd coredns helm prometheus promtool kwok definitions
PYTEST ?= $(PYTHON) -m pytest
export PYTHONPATH = $(CURDIR)/engine:$(CURDIR)/operator

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-14s %s\n", $$1, $$2}'

# ---- what the README names

demo: venv  ## bring up Kubernetes if there is none, install Octavo, serve a model, ask it a question
	@$(BASE_PYTHON) tests/cluster/demo.py up --python $(PYTHON)

demo-down:  ## remove everything that `make demo` started
	@$(BASE_PYTHON) tests/cluster/demo.py down

test: venv model test-cluster-ready  ## every test that this machine can run
	@tests/run $(PYTHON) $(ARGS)
	@$(MAKE) --no-print-directory test-other-pythons

check: venv  ## style, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# ---- parts of it

test-engine: venv model  ## only the engine's tests
	$(PYTEST) tests/engine $(ARGS)

test-gpu: venv model  ## the tests that need a GPU
	@tests/gpu $(PYTHON)

coverage: venv model  ## which lines the tests without a cluster reach
	$(PYTEST) -m "not cluster and not e2e and not gpu" --cov --cov-report=term:skip-covered $(ARGS)

test-fast: venv model  ## everything that needs neither a cluster nor minutes
	$(PYTEST) -m "not cluster and not e2e and not slow and not gpu" $(ARGS)

# The code must run on every Python that pyproject.toml names. The pure tests are enough to show a construct that an
# older one lacks; the heavy libraries are not installed a second time.
test-other-pythons:  ## the import-light tests on the other supported Pythons
	@tests/other-pythons $(BASE_PYTHON)

# The compiler keeps the processors busy, the images the network and the disk.
test-cluster-ready:
	@if $(CLUSTER) install && $(CLUSTER) check; then \
		$(CLUSTER) image & image=$$!; $(CLUSTER) build $(TEST_PROGRAMS); built=$$?; wait $$image && exit $$built; \
	else echo "The tests that need a cluster will be skipped, for the reason above."; fi

images: ## both images from the Dockerfile, and the size of each of their layers
	@$(CLUSTER) image && $(CLUSTER) sizes

model: venv  ## the test model, real SmolLM2-135M-Instruct, in the cache
	@$(PYTHON) tests/models.py

format: venv  ## let ruff format and sort imports
	$(VENV)/bin/ruff check --fix -q . ; $(VENV)/bin/ruff format .

crd: venv  ## write crds/llmserver.yaml and the chart's copy from the operator's model
	$(PYTHON) -m octavo_operator.cli crd > crds/llmserver.yaml
	cp crds/llmserver.yaml helm/octavo/files/llmserver.yaml

dashboards: venv  ## write Grafana's boards into the chart
	$(PYTHON) helm/dashboards.py

bench-cpu: venv model  ## compare with transformers on this CPU
	$(PYTHON) benchmarks/cpu.py

venv: $(VENV)/.made  ## the Python environment

$(VENV)/.made: pyproject.toml
	@tests/make-venv "$(BASE_PYTHON)" $(VENV) engine,operator,dev

.PHONY: help demo demo-down test check test-engine coverage test-fast test-other-pythons test-cluster-ready images \
	model format crd dashboards bench-cpu venv
