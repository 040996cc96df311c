#!/bin/sh
# Set up what is missing, check the code, run all tests, and a few cells of the benchmark: scripts/test.sh [PYTEST-ARGUMENT...]
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
timeout --signal=ABRT --kill-after=30 "$LIMIT" python -X faulthandler -m pytest -n auto --dist worksteal "$@" </dev/null
[ $# = 0 ] || exit 0
echo "A few ratios of the benchmark, in short: they fail nothing, and scripts/bench.sh has them all."
exec timeout --kill-after=30 300 python -m bench --rounds 1 --scenario view --scenario ingest --only "random write, depth 32" 2>&1 </dev/null
