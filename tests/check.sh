#!/usr/bin/env bash
# Lint, types and layers: what `make check` runs, and a test runs it too.
set -eu
cd "$(dirname "$0")/.."
python -m ruff check .
python -m mypy --no-incremental
lint-imports --no-cache
