# make demo | test [plugin=NAME] [slow=1] | lint | docs | bench [peers=1] | reproduce [plugin=NAME] [quick=1]
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(sort $(patsubst plugins/%/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint docs bench reproduce install clean
install: $(STAMP)

$(STAMP): pyproject.toml $(patsubst %,plugins/%/pyproject.toml,$(PLUGINS))
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q $(patsubst %,-e ./plugins/%,$(PLUGINS))
	touch $@

demo: $(STAMP)
	$(BIN)/lightning fit -c configs/quickstart.yaml

test: $(STAMP)
ifdef plugin
	$(BIN)/python -m pytest plugins/$(plugin) -q $(if $(slow),,-m "not slow")
else
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(if $(slow),,-m "not slow")
endif

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks $(if $(peers),--peers)

reproduce: $(STAMP)
	set -e; for name in $(or $(plugin),$(PLUGINS)); do $(BIN)/quire reproduce $$name $(if $(quick),--quick); done
	$(if $(quick),,$(BIN)/python docs/reproduction.py)

clean:
	rm -rf $(VENV) runs site
