#!/bin/sh
# Set up what is missing, then check the code and run all tests: scripts/test.sh [PYTEST-ARGUMENT...]
#
# The whole run is bounded: should it ever hang, it is ended after LIMIT seconds, with the stacks of what it hung in.
set -eu
cd "$(dirname "$0")/.."
LIMIT=2700
scripts/setup.sh test
PATH="$PWD/.venv/bin:$PATH"
export PATH

ruff format --check --quiet .
ruff check --quiet .
mypy
exec timeout --signal=ABRT --kill-after=30 "$LIMIT" python -X faulthandler -m pytest -n auto --dist worksteal "$@" </dev/null
