# Every target installs what it needs into $(VENV) first. `make demo CONFIG=configs/digits_sit.yaml` for the smallest one.
# uv installs where it is there, else pip does, as with `make install UV=`.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/mnist_sit.yaml
BIN := $(VENV)/bin
UV := $(shell command -v uv)

.PHONY: demo test lint docs format install clean

demo: install
	$(BIN)/python -m demo --config $(CONFIG)

test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"This project needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Try: make $(MAKECMDGOALS) PYTHON=python3.12")'
ifdef UV
	$(UV) venv --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --python $(BIN)/python --editable '.[dev]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on --editable '.[dev]'
endif
	@touch $@

clean:
	rm -rf $(VENV) runs site
