# What the demos have in common, to be sourced: steps that are told, anything that is waited for with a bound, and an end that leaves
# nothing behind, however it comes. Whoever sources this has `show_logs` (on standard error, after a failure) and `end_own` (what runs
# besides replfs), works in the directory $work, and mounts there, at primary and secondary, with the daemons' ids in $processes.
# shellcheck shell=sh

SECONDS_EACH=30
AT_MOST="timeout $SECONDS_EACH" # goes before each command that may have to wait for a mount; also keeps ^C from tearing it

step="starting"
reason=""
work=""
processes=""

say() {
    step=$1
    echo "$1"
}

detail() {
    echo "      $1"
}

fail() {
    reason=$1
    exit 1
}

complain() { # STATUS that a check, or a command of itself, ended with
    [ "$1" != 124 ] || reason=${reason:-no answer within $SECONDS_EACH seconds}
    show_logs >&2
    echo "demo: FAILED at \"$step\": ${reason:-a command failed, see above}" >&2
}

leave() { # STATUS: take everything down again, whatever there is by now
    trap - EXIT
    trap '' HUP INT TERM
    set +e
    [ -n "$work" ] || exit "$1"
    {
        end_own
        for side in primary secondary; do
            grep -q "/${work##*/}/$side fuse" /proc/self/mounts || continue
            $AT_MOST replfs umount "$work/$side" && continue
            # shellcheck disable=SC2086
            kill -KILL $processes
            fusermount3 -uz "$work/$side" || umount -l "$work/$side"
        done
    } >/dev/null 2>&1
    rm -rf --one-file-system "$work"
    exit "$1"
}

trap 'status=$?; [ $status = 0 ] || complain $status; leave $((status != 0))' EXIT
trap 'leave 129' HUP
trap 'leave 130' INT
trap 'leave 143' TERM
