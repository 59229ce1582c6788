# Everything a checkout needs. `make test` works on a fresh machine: it makes the environment first.
# PYTHON is what users name their interpreter by, so it is left alone: scripts/setup.sh reads it.
VENV_PYTHON := .venv/bin/python

# Container images often set it. Then every process compiles anew what it imports, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup models test test-versions demo compare lint wheels gpu-kit clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv with SGLang and this project in it (about a second when up to date)
	scripts/setup.sh

models: setup  ## make the small random-weight models
	$(VENV_PYTHON) scripts/make_models.py

# A file at a time in each of several processes, more of them than there are cores: tests wait for disks, stores and
# servers' starts. Those with servers take longest, and come first, so that the short ones fill what is left; the
# longest of all come before them (tests/conftest.py).
TEST_PROCESSES := 3

test: setup models  ## run all tests; ARGS="-k name" selects
	$(VENV_PYTHON) -m pytest tests/servers tests/sglang tests/unit -q -n $(TEST_PROCESSES) --dist loadfile \
	    --no-loadscope-reorder $(ARGS)

# What depends on SGLang's version, with the older one that is supported. Its wheel has no kit for tests of caches.
OLDER := 0.5.22
VERSION_TESTS := test_patches test_sglang_variables test_kv_pool test_page_hashes test_failed_loads test_imports

test-versions: setup models  ## run the tests of the compat room and a few servers with the older SGLang
	scripts/setup_sglang.sh $(OLDER)
	.venv/sglang-$(OLDER)/bin/python -m pytest -q $(VERSION_TESTS:%=tests/unit/%.py)
	.venv/sglang-$(OLDER)/bin/python -m pytest -q tests/servers/test_end_to_end.py tests/servers/test_restart.py \
	    tests/servers/test_routers.py \
	    -k "tiny-gqa-auto-page16-write_through or tiny-mha or first_request or router"

demo: setup models  ## run the demo; ARGS are passed on
	$(VENV_PYTHON) demo/demo.py $(ARGS)

lint: setup  ## run the checks of .pre-commit-config.yaml on all files
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV_PYTHON) -m pre_commit run --all-files

compare: setup models  ## compare with SGLang's HiCache, LMCache and no cache (docs/comparison.md)
	$(VENV_PYTHON) benchmarks/compare.py --json build/compare/compare.json --out build/compare $(ARGS)

wheels: setup  ## build dist/: the sources, and wheels that need no compiler; ARGS="python3.12" names interpreters
	scripts/build_wheels.sh $(ARGS)

gpu-kit:  ## make .gpu/kit, which checks all this on a GPU machine without a network (docs/gpu.md)
	scripts/gpu/make_kit.sh $(ARGS)

clean:  ## remove what was built, but keep .venv and models
	rm -rf build dist logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print -prune | xargs -r rm -rf
	# The editable install may point into build/: have the next setup install it again.
	rm -f .venv/.project-stamp

distclean: clean  ## remove .venv, models and .gpu as well
	rm -rf .venv models .gpu
