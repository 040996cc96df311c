#!/bin/sh
# replfs at work, on this machine and within a minute: two disks with a real ext4 file system, a primary and a secondary, changes
# on both sides, a checkpoint, and a failover under a running writer; e2fsck and checksums at the end. Nothing is left behind.
#
#   scripts/demo.sh [--qcow2] [--no-setup]
#
# With --qcow2 each disk is a compressed qcow2 image over a backing file; without, it is raw. With --no-setup what is in PATH is used;
# else what is missing is set up first.
#
# Exit status: 0 all is as it should be; 1 a check or a command failed, which a line on standard error names.
set -eu
cd "$(dirname "$0")/.."
format=raw
setup=yes
for argument; do
    case $argument in
        --qcow2) format=qcow2 ;;
        --no-setup) setup=no ;;
        *)
            echo "usage: scripts/demo.sh [--qcow2] [--no-setup]" >&2
            exit 2
            ;;
    esac
done
if [ $setup = yes ]; then
    case $format in # qcow2 images are made with qemu-utils, which only the tests need otherwise
        raw) scripts/setup.sh ;;
        qcow2) scripts/setup.sh test ;;
    esac
    PATH="$PWD/.venv/bin:$PATH"
fi
PATH="$PATH:/usr/sbin:/sbin" # an ordinary user's lacks them, and debugfs is there
LC_ALL=C
export PATH LC_ALL

DISK_MIB=128
RING=2048 # blocks of 4 KiB that the writer goes round in
POLLS=600 # of 0.1 seconds: how long anything is waited for

ended="" # the writer, when it is known to have ended

show_logs() {
    [ -n "$reason" ] || [ ! -e "$work/log" ] || tail -n 20 "$work/log"
}

end_own() {
    if [ "${!-}" != "$ended" ]; then # $! is there as soon as the writer is
        : >"$work/stop-writing"
        wait "$!"
    fi
}

. scripts/steps.sh

# What the steps are made of

sum() { # FILE: the start of its checksum
    checksum=$($AT_MOST sha256sum "$1")
    echo "$checksum" | cut -c 1-16
}

content() { # SIDE: what its disk holds now, as a raw file
    case $format in
        raw) echo "$1.raw" ;;
        qcow2)
            $AT_MOST qemu-img convert -U -f qcow2 -O raw "$1.qcow2" "$1.content" >>"$log" 2>&1 || fail "$1.qcow2 cannot be read"
            echo "$1.content"
            ;;
    esac
}

same() { # FILE FILE WHAT
    $AT_MOST cmp "$1" "$2" >>"$log" 2>&1 || fail "$3: $1 and $2 differ"
}

attribute() { # NAME MOUNTPOINT: a control attribute's value
    $AT_MOST getfattr --absolute-names --only-values -n "user.replfs.$1" "$2"
}

process() { # MOUNTPOINT: the id of the process that serves it
    attribute status "$1" | sed 's/.*"pid":\([0-9]*\),.*/\1/'
}

status() { # LINE MOUNTPOINT: one line of the status, shown
    lines=$($AT_MOST replfs status "$2")
    detail "$(echo "$lines" | grep "^$1:")"
}

put() { # IMAGE FILE NAME: copy a file into an image's file system, as debugfs does it, and read it back
    $AT_MOST debugfs -w -R "write $2 $3" "$1" </dev/null >>"$log" 2>&1
    holds "$1" "$2" "$3"
}

holds() { # IMAGE FILE NAME: the file system has that content under the name
    rm -f dumped
    $AT_MOST debugfs -R "dump $3 dumped" "$1" </dev/null >>"$log" 2>&1
    [ -e dumped ] || fail "$1 has no file $3"
    same dumped "$2" "the file $3 in $1"
}

lacks() { # IMAGE NAME
    $AT_MOST debugfs -R "stat $2" "$1" </dev/null 2>&1 | grep -q 'File not found' || fail "$1 has a file $2"
}

sound() { # IMAGE
    $AT_MOST e2fsck -fn "$1" </dev/null >>"$log" 2>&1 || fail "e2fsck finds errors in $1 (exit status $?)"
}

write_on() { # FILE FIRST-BLOCK: until told to stop, write numbered blocks; a number is in `written` once its block is
    number=0
    while [ ! -e stop-writing ]; do
        printf '%4095d\n' "$number" |
            $AT_MOST dd of="$1" bs=4096 iflag=fullblock seek=$(($2 + number % RING)) conv=notrunc status=none ||
            { : >write-failed; exit 1; }
        echo "$number" >>written
        number=$((number + 1))
    done
}

written() { # how many blocks the writer has written
    wc -l <written
}

await_written() { # COUNT: until the writer has written as many
    polls=$POLLS
    while [ "$(written)" -lt "$1" ]; do
        [ ! -e write-failed ] || fail "a write failed"
        polls=$((polls - 1))
        [ "$polls" -gt 0 ] || fail "the writer does not get on: $(written) blocks, not $1"
        sleep 0.1
    done
}

ring() { # COUNT: what the writer's file holds after that many blocks
    awk -v count="$1" -v ring="$RING" 'BEGIN {
        for (place = 0; place < ring; place++)
            printf("%4095d\n", place < count ? place + ring * int((count - 1 - place) / ring) : -1)
    }'
}

work=$(mktemp -d "${TMPDIR:-/tmp}/replfs.XXXXXX")
log="$work/log"
cd "$work"
: >"$log"

say "1. Two equal disks of $DISK_MIB MiB with an ext4 file system and files in it."
mkdir files primary secondary
seq 200000 >files/numbers
head -c 5000000 /dev/urandom >files/random
ring 0 >files/ring
mkfs.ext4 -q -b 4096 -d files base.raw "${DISK_MIB}M" </dev/null >>"$log" 2>&1
for side in primary secondary; do
    case $format in
        raw) cp base.raw $side.raw ;;
        qcow2) # the first 64 MiB are the backing file's; what differs from it, the rest of the disk, is compressed
            [ -e half.raw ] || head -c $((DISK_MIB << 19)) base.raw >half.raw
            $AT_MOST qemu-img convert -c -O qcow2 -B half.raw -F raw base.raw $side.qcow2 >>"$log" 2>&1
            ;;
    esac
done
[ $format = raw ] || $AT_MOST qemu-img info primary.qcow2 >>"$log"
head -c 1500000 /dev/urandom >first
head -c 1500000 /dev/urandom >second
head -c 40000000 /dev/urandom >own

say "2. A secondary, and a primary that forwards to it through a unix socket: both sides are mounted."
$AT_MOST replfs secondary secondary.$format secondary --format $format --listen unix:nbd.sock </dev/null >>"$log" 2>&1
$AT_MOST replfs primary primary.$format primary --format $format --target 'nbd+unix:///disk?socket=nbd.sock' --protocol sync \
    --initial-sync verify </dev/null >>"$log" 2>&1
$AT_MOST replfs resync --wait primary
processes="$(process secondary) $(process primary)"
near=primary/disk.img
far=secondary/disk.img
same "$near" "$far" "before anything is written"

say "3. A file goes into the primary's file system. The secondary's disk has it, and its view does not move."
before=$(sum "$far")
put "$near" first /first
[ "$(sum "$far")" = "$before" ] || fail "the secondary's view has moved before the checkpoint"
same "$near" "$(content secondary)" "what the primary has forwarded"
lacks "$far" /first
sound "$far"
status hidden secondary

say "4. A checkpoint: the secondary's view is the primary's."
$AT_MOST setfattr -n user.replfs.checkpoint -v 1 secondary
same "$near" "$far" "after the checkpoint"
holds "$far" first /first
detail "was $before, is now $(sum "$far") on both sides"

say "5. Each side writes on its own, and neither sees the other: the primary's disk is what its own machine made it."
put "$near" second /second
before=$(sum "$(content primary)")
put "$far" own /own
[ "$(sum "$(content primary)")" = "$before" ] || fail "the primary's disk has changed with the secondary's"
same "$near" "$(content primary)" "the primary's view and disk"
same "$(content secondary)" "$(content primary)" "the secondary's disk, which only the primary changes,"
lacks "$far" /second
lacks "$near" /own
status active secondary

say "6. A failover, while a program writes to the secondary's file."
$AT_MOST debugfs -R "blocks /ring" "$far" </dev/null 2>>"$log" | tr -s ' ' '\n' | grep . >blocks
first_block=$(head -n 1 blocks)
seq "$first_block" $((first_block + RING - 1)) | cmp - blocks >>"$log" 2>&1 || fail "the file /ring is not in one piece"
: >written
write_on "$far" "$first_block" </dev/null >>"$log" 2>&1 &
writer=$!
await_written 50
at_start=$(written)
$AT_MOST setfattr -n user.replfs.failover -v 1 secondary
polls=$POLLS
while stage=$(attribute stage secondary) || fail "its stage cannot be read"; [ "$stage" != "done" ]; do
    [ "$stage" = failover ] || fail "the stage is $stage"
    committed=$(attribute status secondary | sed -n 's/.*"commit":{"done":\([0-9]*\),.*/\1/p')
    [ -z "$committed" ] || detail "committing: $((committed >> 20)) of $DISK_MIB MiB, $(written) blocks written"
    polls=$((polls - 1))
    [ "$polls" -gt 0 ] || fail "the failover is not done"
    sleep 0.1
done
at_end=$(written)
await_written $((at_end + 50))
: >stop-writing
wait "$writer" || fail "a write failed"
ended=$writer
$AT_MOST sync "$far" # or qemu-img, which reads the disk's image, may not see the last second of it
status stage secondary
detail "$(written) blocks written: $at_start before the failover, $((at_end - at_start)) during it, the rest after it"

say "7. The old primary still writes to its own disk, and no longer to the secondary's."
before=$(sum "$(content secondary)")
put "$near" first /late
[ "$(sum "$(content secondary)")" = "$before" ] || fail "the old primary has changed the secondary's disk"
status target primary

say "8. The proof: view and disk are the same, e2fsck finds nothing, and each file is right."
same "$far" "$(content secondary)" "after the failover"
ring "$(written)" >ring
for image in "$far" "$(content secondary)"; do
    sound "$image"
    for file in numbers random; do
        holds "$image" "files/$file" "/$file"
    done
    holds "$image" first /first
    holds "$image" own /own
    holds "$image" ring /ring
    lacks "$image" /second
done
sound "$near"
view=$(sum "$far")
$AT_MOST replfs umount primary
$AT_MOST replfs umount secondary
[ "$(sum "$(content secondary)")" = "$view" ] || fail "the disk is not what the view was"
! grep -h 'ERROR\|Traceback' ./*.replfs/replfs.log >&2 || fail "replfs has logged an error"
if [ $format = qcow2 ]; then
    for side in primary secondary; do
        $AT_MOST qemu-img check $side.qcow2 >>"$log" 2>&1 || fail "qemu-img check finds errors in $side.qcow2"
    done
fi
detail "view $view = disk $(sum "$(content secondary)")"
echo "All is as it should be."
