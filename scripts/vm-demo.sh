#!/bin/sh
# replfs under real virtual machines, on this machine and in about a minute: one runs on a primary's file and is killed, together with the
# primary; another one goes on from the secondary's file, with everything that was there at the checkpoint. Nothing is left behind.
#
#   scripts/vm-demo.sh [--cache none|writeback|directsync] [--aio native|io_uring|threads] [--accel tcg|kvm] [--no-setup]
#
# QEMU's --cache and --aio are none and native unless said otherwise; native needs none or directsync. The accelerator is tcg, which is
# slow and works everywhere. With --no-setup what is in PATH is used; else what is missing is set up first. The guest is made by
# scripts/vm-guest.sh in .venv/vm, once.
#
# Exit status: 0 all is as it should be; 1 a check or a command failed, which a line on standard error names.
set -eu
cd "$(dirname "$0")/.."
cache=none
aio=native
accel=tcg
setup=yes

usage() {
    echo "usage: scripts/vm-demo.sh [--cache none|writeback|directsync] [--aio native|io_uring|threads] [--accel tcg|kvm] [--no-setup]" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1:${2:-} in
        --cache:none | --cache:writeback | --cache:directsync) cache=$2 ;;
        --aio:native | --aio:io_uring | --aio:threads) aio=$2 ;;
        --accel:tcg | --accel:kvm) accel=$2 ;;
        --no-setup:*) setup=no ;;
        *) usage ;;
    esac
    case $1 in
        --no-setup) shift ;;
        *) shift 2 ;;
    esac
done
[ $aio:$cache != native:writeback ] || usage
if [ $setup = yes ]; then
    scripts/setup.sh vm
    PATH="$PWD/.venv/bin:$PATH"
fi
PATH="$PATH:/usr/sbin:/sbin" # an ordinary user's lacks them, and e2fsck is there
LC_ALL=C
export PATH LC_ALL
scripts/vm-guest.sh
guest="$PWD/.venv/vm"

DISK_MIB=128
POLLS=600 # of 0.1 seconds: how long anything is waited for

ended="" # the machine that was started last, when it is known to have ended

show_logs() {
    [ -z "$work" ] || tail -n 20 "$work"/log "$work"/console* 2>/dev/null || :
}

end_own() {
    # By $!, which is there as soon as the machine is. In a subshell: failing must not end this.
    [ "${!-}" = "$ended" ] || (end "$!")
}

. scripts/steps.sh

# What the steps are made of

until_so() { # WHAT COMMAND...: until the command succeeds
    what=$1
    shift
    polls=$POLLS
    until "$@"; do
        polls=$((polls - 1))
        [ "$polls" -gt 0 ] || fail "waited in vain: $what"
        sleep 0.1
    done
}

gone() { # PROCESS...: all of each has ended
    for process; do
        ! grep -qs '^State:.[^ZX]' "/proc/$process/task/"*/status || return 1
    done
}

end() { # PROCESS...: kill them, all at once
    kill -KILL "$@"
    until_so "the end of $*" gone "$@"
    ended=$!
}

boot() { # FILE WHAT-TO-DO: a machine with that disk; what it says goes to the file console-WHAT-TO-DO
    # -cpu max has RDRAND: without, mke2fs waits for random numbers for seconds.
    qemu-system-x86_64 -machine pc,accel=$accel -cpu max -m 256 -nodefaults -display none -no-reboot -serial stdio \
        -kernel "$guest/vmlinuz" -initrd "$guest/initrd" -append "console=ttyS0 quiet panic=-1 replfs.do=$2" \
        -drive "file=$1,format=raw,if=virtio,cache=$cache,aio=$aio" </dev/null >"console-$2" 2>&1 &
    machine=$!
}

process() { # MOUNTPOINT: the id of the process that serves it
    $AT_MOST replfs status "$1" | sed -n 's/^process: *\([0-9]*\),.*/\1/p'
}

said() { # WHAT-IT-DOES WORD: what the machine said last with that word, in a line that has come to its end
    sed -n "s/^GUEST: $2 \(.*\)\r\$/\1/p" "console-$1" | tail -n 1
}

has_said() { # WHAT-IT-DOES WORD: it has said that word by now
    if gone "$machine"; then ended=yes; else ended=no; fi # looked at first: what it said before it ended counts
    ! grep -q '^GUEST: FAILED' "console-$1" || fail "the machine says: $(said "$1" FAILED)"
    [ -z "$(said "$1" "$2")" ] || return 0
    [ $ended = no ] || fail "the machine has ended before it said $2"
    return 1
}

has_written() { # NUMBER: it has written and synced as many files
    has_said make LATER && [ "$(said make LATER)" -ge "$1" ]
}

work=$(mktemp -d "${TMPDIR:-/tmp}/replfs.XXXXXX")
cd "$work"
log="$work/log"
: >"$log"

say "1. Two empty disks of $DISK_MIB MiB: a secondary, and a primary that forwards to it."
mkdir primary secondary
truncate -s ${DISK_MIB}M primary.raw secondary.raw
$AT_MOST replfs secondary secondary.raw secondary --listen unix:nbd.sock </dev/null >>"$log" 2>&1
$AT_MOST replfs primary primary.raw primary --target 'nbd+unix:///disk?socket=nbd.sock' </dev/null >>"$log" 2>&1
$AT_MOST replfs resync --wait primary
daemon=$(process primary)
processes="$daemon $(process secondary)"

say "2. A virtual machine boots with the primary's file as its disk (cache=$cache, aio=$aio), makes an ext4 file system, and fills it."
boot primary/disk.img make
until_so "the machine's files" has_said make WRITTEN
written=$(said make WRITTEN)
until_so "20 more files" has_written 20
detail "its files: $(echo "$written" | cut -c 1-16), and it goes on writing numbered ones, with a sync after each"

say "3. A checkpoint, while it writes."
before=$(said make LATER)
$AT_MOST replfs checkpoint primary
after=$(said make LATER)
until_so "more files after the checkpoint" has_written $((after + 20))
detail "file $before was written when it began, and file $after when it was done; now it is at $(said make LATER)"

say "4. The machine and the primary's replfs are killed."
end "$machine" "$daemon"
$AT_MOST replfs umount primary

say "5. The secondary takes over."
$AT_MOST replfs failover --wait secondary >>"$log"
detail "$($AT_MOST replfs status secondary | grep ^stage:)"

say "6. Another virtual machine boots with the secondary's file as its disk, mounts the file system, writes, and checks it."
boot secondary/disk.img check
until_so "the second machine" has_said check CLEAN
until_so "the end of the second machine" gone "$machine"
ended=$!
last=$(said check LATER)
[ "$(said check CLEAN)" = "$written" ] || fail "its files are $(said check CLEAN), not $written"
[ "$last" -ge "$before" ] || fail "file $before, which was there before the checkpoint, is lost: the last one is $last"
[ "$last" -le $((after + 3)) ] || fail "file $last is there, which was written after the checkpoint"
detail "its files: $(said check CLEAN | cut -c 1-16), and the numbered ones up to $last; the journal was replayed, e2fsck finds nothing"

say "7. The proof: the disk is what the file was, and e2fsck on this side finds nothing either."
view=$($AT_MOST sha256sum <secondary/disk.img)
$AT_MOST replfs umount secondary
[ "$(sha256sum <secondary.raw)" = "$view" ] || fail "the disk is not what the view was"
e2fsck -fn secondary.raw </dev/null >>"$log" 2>&1 || fail "e2fsck finds errors in secondary.raw (exit status $?)"
! grep -h 'ERROR\|Traceback' ./*.replfs/replfs.log >&2 || fail "replfs has logged an error"
detail "$(echo "$view" | cut -c 1-16)"
echo "All is as it should be."
