# Trireme: the few verbs of a checkout. `make demo` is the place to begin; the command line is .venv/bin/trireme.

TRIREME := .venv/bin/trireme
PYTEST  := .venv/bin/python -m pytest
MODEL   := models/SmolLM2-135M-Instruct/source.json

# Tests are dealt out over the cores, file by file, in this order: files that take minutes first, so that none is left over at the end.
# One thread a process, since they share the cores: threads that wait for one another spin.
ROOMS   := $(addprefix tests/,tools server plans ranks parallel models kernels weights layers serve engine core layout)
SPREAD  := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help env demo serve chat test test-plans bench lint clean

help:     ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

env: .venv/.ready  ## .venv with everything in it: dependencies, tritonserver, the command line (PYTHON=, TRIREME_SYSTEM_SITE=1)

demo: env ## set up, start a real tritonserver on model_repository/, stream a chat answer, stop
	@$(TRIREME) demo

serve: env $(MODEL) ## keep the server of model_repository/ running until Ctrl-C
	@$(TRIREME) serve

chat: env ## talk to a running server in the terminal
	@$(TRIREME) chat

test: env $(MODEL) ## lint, then every test tier this machine has hardware for (ARGS='-k name' for some)
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 $(PYTEST) $(SPREAD) --durations=30 $(ROOMS) $(ARGS)

test-plans: env ## the whole grid of plans against transformers, and the support matrix that follows (20 minutes on 2 cores)
	$(PYTEST) -m "grid or not grid" tests/plans/test_grid.py tests/plans/test_rebalance.py tests/plans/test_routed.py $(ARGS)
	$(TRIREME) plan --matrix --results build/plans.json

bench: env $(MODEL) ## one stream offline, and eight through a server that `make serve` keeps: both against transformers
	$(TRIREME) bench --offline --requests 3 --concurrency 1 --output-len 128 --peer transformers --output build/bench/offline
	$(TRIREME) bench --requests 32 --concurrency 8 --peer transformers --output build/bench/served

lint: env ## ruff (rules and format) and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

clean:    ## remove what was made here, but not the demo model
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis

.venv/.ready: pyproject.toml constraints.txt tools/env.sh
	@bash tools/env.sh

$(MODEL): | env
	@$(TRIREME) fetch-demo
