# What the scripts here share; each reads it first, and runs in an empty directory of its own. They show each command they run,
# so that the output of one that failed ends with what failed. One that failed unmounts what it left; one that succeeds leaves
# nothing.

get() { # NAME PATH: a control attribute's value
    getfattr --absolute-names --only-values -n "user.replfs.$1" "$2"
}

is() { # VALUE NAME PATH: the attribute has this value
    [ "$(get "$2" "$3")" = "$1" ]
}

becomes() { # VALUE NAME PATH: the attribute has this value within 20 seconds
    polls=200
    until is "$1" "$2" "$3"; do
        polls=$((polls - 1))
        [ "$polls" -gt 0 ]
        sleep 0.1
    done
}

refused() { # TEXT COMMAND...: the command fails, with TEXT and no traceback; $status has its exit status, the file said its output
    wanted=$1
    shift
    status=0
    "$@" >said 2>&1 || status=$?
    cat said >&2
    [ "$status" != 0 ]
    grep -qF -- "$wanted" said
    ! grep -q Traceback said || return 1
}

primary() { # DISK MOUNTPOINT TARGET OPTION...: mounted and linked, from equal disks; what is written is on both sides at once
    disk=$1 mountpoint=$2 target=$3
    shift 3
    replfs primary "$disk" "$mountpoint" --target "$target" --protocol sync --initial-sync none "$@"
    replfs resync --wait "$mountpoint"
}

process() { # MOUNTPOINT: the process that serves it
    replfs status "$1" | sed -n 's/^process: *\([0-9]*\),.*/\1/p'
}

crash() { # PROCESS MOUNTPOINT: kill it, and wait until all of it is gone and the mount is dead
    kill -KILL "$1"
    polls=200
    while ! ls "$2" 2>&1 | grep -q 'not connected' || grep -qs '^State:.[^ZX]' "/proc/$1/task/"*/status; do
        polls=$((polls - 1))
        [ "$polls" -gt 0 ]
        sleep 0.1
    done
}

unmount_all() { # a, b and c are where the scripts mount
    for mount in a b c; do
        fusermount3 -uz "$mount" || umount -l "$mount" || :
    done
}

trap '[ $? = 0 ] || { set +x; unmount_all; } 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
PS4='$ '
set -x
