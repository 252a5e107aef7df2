PYTHON ?= python3
BIN := .venv/bin
export PYTHONSAFEPATH := 1

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/heatmill demo --out demo

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/lint && ln -sfn "$(CURDIR)" .venv/lint/heatmill
	cd .venv/lint && ../bin/python -m mypy --config-file heatmill/pyproject.toml -p heatmill.engine -p heatmill.kernels -p heatmill.models -m heatmill.cli
	cd .venv/lint && ../bin/lint-imports --config heatmill/pyproject.toml

wheel: .venv/ready
	rm -rf build dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda-build]'
	$(BIN)/python -m heatmill.kernels.build
	$(BIN)/python -m build --wheel --outdir dist .

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "heatmill needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf .venv build dist demo kernels/cubins *.egg-info
