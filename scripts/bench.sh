#!/bin/sh
# replfs and QEMU's own block layer at the same work, in turn, on this machine: a table of ratios, and all numbers as JSON.
#
#   scripts/bench.sh [--quick] [--rounds N] [--scenario NAME]... [--only WORDS] [--json FILE] [--dir DIRECTORY]
#
# What is missing is set up first. With --quick it ends within 5 minutes; else it takes about 25. It needs 6 GiB of room in DIRECTORY
# (default: /tmp), which should be on the kind of disk that matters to you, and nothing else to do for the machine meanwhile.
#
# Exit status: 0 it has measured, whatever came out; 1 something that was to be measured does not work, which a line tells.
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh bench
PATH="$PWD/.venv/bin:$PATH"
export PATH
exec python -m bench "$@"
