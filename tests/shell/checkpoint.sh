# A checkpoint makes what the secondary shows equal to its disk, and nothing else does.
. "$(dirname "$0")/lib.sh"

dd if=/dev/urandom of=a.raw bs=1M count=8
cp a.raw b.raw
cp a.raw before.raw
mkdir a b
replfs secondary b.raw b --listen unix:nbd.sock
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'
cmp a/disk.img before.raw
cmp b/disk.img before.raw

# What is written to the primary reaches both disks, but not what the secondary shows.
dd if=/dev/urandom of=a/disk.img bs=100001 seek=3 count=5 conv=notrunc
cmp a/disk.img a.raw
cmp a/disk.img b.raw
cmp b/disk.img before.raw

# What is written to the secondary's file shows there, and is on neither disk.
cp before.raw expected.raw
dd if=/dev/urandom of=own bs=30001 count=1
dd if=own of=expected.raw bs=30001 seek=11 conv=notrunc
dd if=own of=b/disk.img bs=30001 seek=11 conv=notrunc
cmp b/disk.img expected.raw
cmp a/disk.img b.raw
cmp a/disk.img a.raw

# The checkpoint, by the attribute and by the command; the file is the same one, open all the while.
exec 3<b/disk.img
setfattr -n user.replfs.checkpoint -v 1 b/disk.img
cmp b/disk.img a/disk.img
cmp - a/disk.img <&3
exec 3<&-
is 1 generation b
printf 'the last byte' | dd of=a/disk.img bs=1 seek=8388595 conv=notrunc
refused differ cmp b/disk.img a/disk.img
replfs checkpoint b
cmp b/disk.img a/disk.img
is 2 generation b/disk.img

# On the primary it is one of what is written there by then.
printf 'the last byte again' | dd of=a/disk.img bs=1 seek=5 conv=notrunc
replfs checkpoint a
cmp b/disk.img a/disk.img
is 1 generation a
is 3 generation b

# Status, for people and for programs.
replfs status b | grep -x 'stage: *running'
replfs status b | grep -x 'generation: *3'
replfs status b | grep -x 'listen: .*nbd.sock, export .disk., 3 connections'
replfs status a | grep -x 'link: *connected'
replfs status a | grep -x 'out of sync: *0 B'
replfs status b --json | python -c 'import json, sys; assert json.load(sys.stdin)["size"] == 8 << 20'

# The size is the disk's.
refused 'Operation not permitted' truncate -s +1M b/disk.img
refused 'No space left on device' dd if=own of=b/disk.img bs=1M seek=8 conv=notrunc
cmp b/disk.img a/disk.img

replfs umount a
replfs umount b
cmp a.raw b.raw
