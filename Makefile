# make demo and make test do all their set-up on a fresh machine; the second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?=
DEMO ?= runs/demo
# HASHED=1: every package must have the checksum in constraints-hashed.txt (Linux, x86-64, Python 3.11)
HASHED ?=
TOOLS := $(VENV)-tools

.PHONY: demo test test-faults lint docs docs-snippets clean sbom audit

$(READY): pyproject.toml constraints.txt constraints-hashed.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifdef HASHED
	$(BIN)/python -m pip install --quiet --require-hashes -r constraints-hashed.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
endif
	touch $@

demo: $(READY)
	$(BIN)/cmt-mae demo --out $(DEMO) $(if $(DATA),--data $(DATA))

# the fault harness and its own tests (tests/benchmarks/test_faults.py) take much longer: `make test-faults`
test: lint
	$(BIN)/python -m pytest -n 2 --ignore tests/benchmarks/test_faults.py

# every fault of the table, for real; writes docs/results/faults.json and faults.md
test-faults: $(READY)
	$(BIN)/python -m pytest tests/benchmarks/test_faults.py
	$(BIN)/python -m benchmarks.faults

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks docs sample
	$(BIN)/mypy

# dist/docs/index.html: the documents as a site, every warning an error; nothing on a page comes from a network
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# every block of docs/*.md in bash as it is typed, the slow ones too (some minutes)
docs-snippets: $(READY)
	CMT_MAE_DOCS=all $(BIN)/python -m pytest tests/docs/test_docs_snippets.py

# dist/cmt-mae.cdx.json: bill of materials (CycloneDX) of the environment that the tests run in
sbom: $(READY) $(TOOLS)/.ready
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library \
	  --output-reproducible --of JSON -o dist/cmt-mae.cdx.json

# known advisories of the pinned packages; needs the network, so it is no part of `make test`
audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip -r constraints-hashed.txt

$(TOOLS)/.ready: Makefile
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) .pytest_cache .mypy_cache .ruff_cache
