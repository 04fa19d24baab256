# Each target makes and uses its own virtual environment under .venv/, with the versions pinned in constraints.txt.
#   make demo    the whole street: videos -> data -> training -> scores -> web chat (ARGS="--no-web --out DIR --seed N")
#   make test    the test suite, checks included (ARGS="-k name" goes to pytest)
#   make check   ruff, mypy --strict, import-linter
#   make bench   the benchmarks, into benchmarks/results/, and the page of them (ARGS="serve", ARGS=--quick)
PYTHON ?= python3
ARGS ?=
PIP_QUIET = -q --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

demo_extras = gen,train,serve,eval
test_extras = gen,ray,redact,train,serve,wsi,eval,dev
# Of the extra gpu, what also runs on a CPU: 4-bit training and ZeRO are tested there.
test_more = bitsandbytes deepspeed
check_extras = gen,redact,train,serve,eval,dev
bench_extras = gen,train,serve,eval

.PHONY: help demo test check bench
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# torch is installed first and alone: with it in place no other package chooses a CUDA build of its own.
.venv/%/.ready: pyproject.toml constraints.txt
	@echo "installing into .venv/$* (about two minutes the first time)"
	@$(PYTHON) -m venv .venv/$*
	@.venv/$*/bin/python -m pip install $(PIP_QUIET) -c constraints.txt torch 2> >(grep -v '^WARNING: Location' >&2)
	@.venv/$*/bin/python -m pip install $(PIP_QUIET) -c constraints.txt -e '.[$($*_extras)]' $($*_more) 2> >(grep -v '^WARNING: Location' >&2)
	@touch $@

demo: .venv/demo/.ready
	@.venv/demo/bin/python -m medllava demo $(ARGS)

test: .venv/test/.ready
	@bash tests/install_browser.sh
	@.venv/test/bin/python -m pytest $(ARGS)

check: .venv/check/.ready
	@PATH="$(CURDIR)/.venv/check/bin:$$PATH" bash tests/check.sh

bench: .venv/bench/.ready
	@.venv/bench/bin/python benchmarks/run.py $(ARGS)
