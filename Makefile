.DEFAULT_GOAL := help
.PHONY: help run test slow check bench docs families gpu-check clean

PYTHON ?= python
ARGS ?= --teachers bert,bert2 --student distilbert
OUT ?= bench/results/gpu-check
BENCH ?= bench.json

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run:  ## distil: make run ARGS="--teachers bert --student tinybert"
	$(PYTHON) -m engine.train $(ARGS)

test:  ## the quick tests
	$(PYTHON) -m pytest

slow:  ## the slow tests: builds, whole runs
	$(PYTHON) -m pytest -m slow

check:  ## what ruff finds, and what it would format; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench:  ## check, then time what stands in bench/, into BENCH; --full takes hours
	$(PYTHON) -m pytest bench --benchmark-only --benchmark-json $(BENCH)

docs:  ## write the generated parts of README.md and docs/ again
	$(PYTHON) -m bench.table
	$(PYTHON) -m bench.results_page
	$(PYTHON) -m docs.make_settings
	$(PYTHON) -m docs.make_picture

families:  ## run the command with tiny models of every family, minutes; writes docs/families.md
	$(PYTHON) -m bench.survey --write

gpu-check:  ## on a machine with a GPU: its tests and benchmarks, 8 minutes, kept in OUT
	$(PYTHON) -m bench.gpu_check --out $(OUT)

clean:  ## remove build products and caches; results in runs/ and environments stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks engine/_native-*.so
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
