# What people and CI call. Every target makes the environment in .venv when it is missing or stale.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A real guest's parts: a folder that is made when it is missing, and what to use instead of its firmware or of QEMU.
GUEST ?= .guest
OVMF ?=
QEMU ?=
EFI_SECRET ?=
GUEST_OPTIONS = $(if $(QEMU),--qemu "$(QEMU)") $(if $(filter 1,$(EFI_SECRET)),--efi-secret)
PROTOS := $(shell find proto -name '*.proto')

# The interpreter's caches go with the environment, so that a run leaves nothing else in the checkout.
e2e guest: export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
# Tests start programs by the thousand, which should not be compiled each time, whatever the environment says.
test soak e2e guest: export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test soak hammer e2e guest transcripts lint format bench lock clean

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## launch one guest on a software platform, attested end to end (ARGS=--tamper=kernel …)
	@$(BIN)/sevattest demo $(shell test -f "$(GUEST)/stamp.json" && echo '--guest "$(GUEST)"') $(if $(QEMU),--qemu "$(QEMU)") $(ARGS)

test: $(VENV)/.ready ## every test that needs no special hardware (ARGS=… goes to pytest)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

hammer: $(VENV)/.ready ## spend a grant under kill -9 and a crashing database, for minutes (ARGS="--seed N --launches N …")
	$(BIN)/python -m tests.hammer $(ARGS)

soak: export SOAK_CYCLES ?= 1000
soak: $(VENV)/.ready ## a thousand launches on one agent, honest and hostile: nothing of them is left; takes minutes
	$(BIN)/python -m pytest -q -s tests/integration/test_agent_cycles.py $(ARGS)

e2e: $(VENV)/.ready ## real guests on a real QEMU read real secrets, or do not (GUEST=DIR OVMF=FILE QEMU=FILE EFI_SECRET=1)
	@$(BIN)/python -m tests.e2e.prerequisites "$(GUEST)" $(GUEST_OPTIONS)
	@exec $(BIN)/python -m pytest tests/e2e -n 2 --dist worksteal -p no:cacheprovider -rfE \
		--guest "$(GUEST)" $(GUEST_OPTIONS) $(if $(OVMF),--ovmf "$(OVMF)") $(ARGS)

guest: $(VENV)/.ready ## the parts of a real guest, from Debian packages, into .guest (GUEST=DIR EFI_SECRET=1)
	@$(BIN)/python -m tests.e2e.packages "$(GUEST)" $(if $(filter 1,$(EFI_SECRET)),--efi-secret)

transcripts: guest ## renew docs/transcripts and the README's excerpts from real runs
	$(BIN)/python -m tests.e2e.transcript --guest "$(GUEST)" $(if $(QEMU),--qemu "$(QEMU)")

lint: $(VENV)/.ready ## formatting, rules, types, import directions, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint proto
	$(BIN)/python tests/support/repository.py

format: $(VENV)/.ready ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready ## speed, as ratios measured side by side in one run
	$(BIN)/python -m tests.bench $(ARGS)

lock: $(VENV)/.ready ## renew requirements/*.txt from pyproject.toml (needs uv)
	./requirements/lock.sh

clean: ## forget the environment and everything generated
	rm -rf $(VENV) common/gen .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Locked packages by hash first; then this checkout, editable, which generates sevattest.v1 from proto/.
$(VENV)/.ready: requirements/dev.txt pyproject.toml hatch_build.py $(PROTOS)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer with venv (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; name one with PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
