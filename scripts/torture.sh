#!/bin/sh
# Check at full length what becomes of everything when things break: power cuts, I/O errors, kills, full file systems, signals, lost
# links; and that a secondary of replfs and one of QEMU agree on 20,000 operations each: scripts/torture.sh [PYTEST-ARGUMENT...]
#
# Each kind is a run of its own, which says at its end how many cases have passed. The exit status is 0 only if nothing failed. Every
# run is bounded: should it ever hang, it is ended after LIMIT seconds, with the stacks of what it hung in.
set -u
cd "$(dirname "$0")/.." || exit 1
LIMIT=7200
scripts/setup.sh test || exit 1
PATH="$PWD/.venv/bin:$PATH"
export PATH

status=0
for tests in "tests/test_power_cut.py tests/test_power_cut_mutants.py" tests/test_io_errors.py tests/test_storms.py \
    tests/test_full_disk.py tests/test_shutdown.py tests/test_qcow2_kill.py \
    "tests/test_link_storms.py tests/test_links.py tests/test_link_syncs.py tests/test_reprotection.py" tests/test_qemu_either_end.py; do
    # shellcheck disable=SC2086 # one word or two
    timeout --signal=ABRT --kill-after=30 "$LIMIT" \
        python -X faulthandler -m pytest -q -n auto --dist worksteal --full $tests "$@" </dev/null || status=1
done
exit "$status"
