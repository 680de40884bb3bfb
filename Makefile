# Every verb is one line and calls a tool. `make` alone lists them.
# PYTHON=python3.12 chooses the interpreter; without it tools/find-python takes the first one that is new enough.

PYTHON ?=
# Twice the processors it is meant for: slow tests wait for leases and guests more than they compute.
WORKERS ?= 4
SEEDS ?= 10000
FROM ?= 0
JOBS ?= 2
BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick test-sim programs lint fmt protos verify-protos pins bench bench-reduction bench-vms bench-healing up compose-up clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: .venv/.complete ## make .venv with everything that development needs
	@echo "set up; .venv/bin/holdfast --help"

demo: setup ## run the main job on this machine and print what it measured
	$(BIN)/holdfast demo

test: setup programs ## run the whole suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: setup programs ## run the suite without the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-sim: setup ## live through SEEDS simulated histories from seed FROM on, in JOBS processes; figures to JSON
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --from $(FROM) --jobs $(JOBS) $(if $(JSON),--json $(JSON))

programs:
	tools/system-packages check

lint: setup ## ruff, mypy --strict, import floors, proto files, Dockerfiles
	tools/lint

fmt: setup ## format the Python and proto files
	tools/fmt

protos: .venv-protos/.complete ## generate the protobuf and gRPC code again
	tools/generate-protos protos

verify-protos: .venv-protos/.complete ## check that the generated code is what the proto files say
	tools/verify-protos

pins: ## resolve the dependencies afresh and write constraints.txt
	tools/pin

bench: setup ## measure against restic, borg and the machine's own limits
	$(BIN)/python -m benchmarks

bench-reduction: setup ## measure how many bytes are not kept, row by row
	$(BIN)/python -m benchmarks.reduction

bench-vms: setup programs ## measure what real VMs gain: increments, templates, instant restore
	$(BIN)/python -m benchmarks.vms

bench-healing: setup ## measure how fast a cluster heals, and what its clients feel of it
	$(BIN)/python -m benchmarks.healing

up: setup ## a whole cluster in the foreground, in .up
	$(BIN)/holdfast up --data .up

compose-up: ## the cluster of deploy/ in containers
	deploy/compose-up

clean: ## remove what make made
	rm -rf .venv .venv-protos .demo .bench dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/.complete: pyproject.toml constraints.txt tools/setup tools/find-python $(if $(PYTHON),FORCE)
	tools/setup .venv

.venv-protos/.complete: constraints-protos.txt tools/setup tools/find-python $(if $(PYTHON),FORCE)
	tools/setup .venv-protos

# An interpreter that is named is compared with the one in place, each time.
FORCE:
