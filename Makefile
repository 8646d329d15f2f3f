# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

# every test starts processes of its own: compiled modules are kept, even where the environment forbids it, as images of containers
# often do; without them each process compiles torch anew, for 7 seconds of a core
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow check bench bench-page docs site links clean

demo: .venv/installed
	$(BIN)/megdet demo

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/installed
	$(BIN)/python bench/all.py

bench-page: .venv/installed
	$(BIN)/python bench/all.py --page

docs: .venv/installed
	$(BIN)/python docs/make.py

# the documentation as web pages, in site/; a warning is an error
site: .venv/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs site

# asks the network whether the pages that we link to are there
links: .venv/installed
	$(BIN)/python docs/links.py

# uv brings torch with CUDA in seconds, which runs on CPU as well; pip alone may find a build that torchvision refuses
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

clean:
	rm -rf .venv
