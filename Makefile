# `make serve` and `make test` are all that is needed on a fresh machine with Python 3.11: whatever a target needs is
# installed first, into .venv, by requirements/install.sh.

CONFIG ?= cluster.yaml
PORT ?=
ARGS ?=
SCENARIO ?= chat
URL ?=
MODEL ?=
DURATION ?=
VARIANT ?= cpu
TAG ?=
BASE ?=
BUILDER ?=

BIN := .venv/bin
LIGHT := .venv/.light-installed
CPU := .venv/.cpu-installed
DEV := .venv/.dev-installed
CLIENTS := .venv/.clients-installed
PEERS := .venv/.peers-installed

.PHONY: help serve test test-unit faults rehearsal load compare image check setup down clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

serve: $(CPU) ## start the cluster, print a curl to try, stop it with Ctrl-C; CONFIG=file, PORT=number
	@exec $(BIN)/millstream up $(CONFIG) $(if $(PORT),--port $(PORT))

test: $(CLIENTS) ## run all tests; ARGS="-k name" goes to pytest
	$(BIN)/python -m pytest $(ARGS)

test-unit: $(LIGHT) ## run the quick tests, which need neither torch, vLLM, a cluster nor PostgreSQL; ARGS= as above
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not cluster and not vllm and not postgres and not slow" $(ARGS)

faults: $(DEV) ## kill processes under load for 10 minutes, then audit the ledger; ARGS="--seed 2 --seconds 60", ARGS=--vllm
	$(BIN)/python -m tests.faults.campaign $(ARGS)

rehearsal: $(DEV) ## run what is rendered for Kubernetes on hosts of its own, cut links, kill hosts, 10 minutes; needs root; ARGS=--vllm, ARGS=--tls
	$(BIN)/python -m tests.rehearsal $(ARGS)

# KEY reaches it through the environment: others can read a command line, and make would print it.
ifdef KEY
load: export MILLSTREAM_KEY = $(KEY)
endif
load: $(DEV) ## load test with a report; SCENARIO=chat (help lists them), URL=, KEY= and MODEL= of a running server, DURATION=seconds
	$(BIN)/python -m loadtests.load.run $(SCENARIO) $(if $(URL),--url $(URL)) $(if $(MODEL),--model $(MODEL)) \
		$(if $(DURATION),--seconds $(DURATION)) $(ARGS)

compare: $(PEERS) ## measure Millstream beside its peers, half an hour, tables into docs/performance.md; ARGS=--help
	$(BIN)/python -m loadtests.comparison $(ARGS)

image: ## build the image of the pods with docker, podman or buildah; VARIANT=gpu, TAG=name:version, BASE=image
	@$(or $(wildcard $(BIN)/python),python3) -m requirements.image $(VARIANT) $(if $(TAG),--tag $(TAG)) \
		$(if $(BASE),--base $(BASE)) $(if $(BUILDER),--builder $(BUILDER)) $(ARGS)

check: $(LIGHT) ## ruff, mypy and the order of the rooms (import-linter)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

setup: $(CLIENTS) ## only install, with the development tools and the clients of the tests

down: ## stop a cluster that was left running
	@test -x $(BIN)/millstream || { echo "Nothing is installed here, so nothing runs: no $(BIN)/millstream."; exit 1; }
	@exec $(BIN)/millstream down

clean: ## remove .venv, caches and build results; the ledger and the keys in ~/.millstream stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp holds the path of its environment: in a moved or copied tree it is worth nothing (requirements/install.sh then
# makes .venv anew).
ifneq ($(file <$(LIGHT)),$(CURDIR)/.venv)
.PHONY: $(LIGHT)
endif
ifneq ($(file <$(CPU)),$(CURDIR)/.venv)
.PHONY: $(CPU)
endif

$(LIGHT): requirements/light.lock requirements/dev.lock pyproject.toml
	@requirements/install.sh light

$(CPU): requirements/cpu.lock pyproject.toml
	@requirements/install.sh cpu

$(DEV): $(LIGHT) $(CPU)
	@requirements/install.sh dev

$(CLIENTS): requirements/clients.lock requirements/javascript/package-lock.json $(DEV)
	@requirements/install.sh clients

$(PEERS): requirements/peers.lock $(CLIENTS)
	@requirements/install.sh peers
