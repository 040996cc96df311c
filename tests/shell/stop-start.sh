# Stop without a failover, and start again: --no-start, start, stop, --stop-on-unmount.
# expects: the link (to .* )?is (given up|lost)
# expects: no link: 
. "$(dirname "$0")/lib.sh"

dd if=/dev/urandom of=a.raw bs=1M count=8
cp a.raw b.raw
mkdir a b

# Mounted with stage none, the secondary's file cannot be read. Starting either side is a command, or an attribute.
replfs secondary b.raw b --listen unix:nbd.sock --no-start
is none stage b
refused 'Input/output error' dd if=b/disk.img of=/dev/null count=1
replfs start b
is running stage b
replfs primary a.raw a --target 'nbd+unix:///disk?socket=nbd.sock' --no-start --protocol sync --initial-sync none
is none stage a
cmp a/disk.img a.raw
setfattr -n user.replfs.start -v primary a/disk.img
is running stage a
replfs resync --wait a
cmp b/disk.img a/disk.img

# Stop: the secondary shows what its disk holds, and what was written to its own file is gone.
dd if=/dev/urandom of=a/disk.img bs=50k count=10 conv=notrunc
dd if=/dev/urandom of=b/disk.img bs=50k seek=5 count=10 conv=notrunc
refused differ cmp a/disk.img b/disk.img
setfattr -n user.replfs.stop -v 1 b
is done stage b
is '' error b
cmp a/disk.img b/disk.img
cmp a/disk.img b.raw
cp b.raw stopped.raw

# The primary goes on alone, and is told with its next write.
dd if=/dev/urandom of=a/disk.img bs=50k count=10 conv=notrunc
cmp a/disk.img a.raw
cmp b/disk.img stopped.raw
is 'I/O error occurred' error a
replfs stop a
is done stage a
is '' error a
replfs umount a
replfs umount b

# Start over, from equal disks, with the old state set aside.
cp a.raw b.raw
mv a.raw.replfs a.old
mv b.raw.replfs b.old
replfs secondary b.raw b --listen unix:nbd.sock --stop-on-unmount
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'
dd if=/dev/urandom of=a/disk.img bs=50k seek=20 count=3 conv=notrunc
echo gone | dd of=b/disk.img conv=notrunc
replfs umount a
replfs umount b
cmp a.raw b.raw
grep '"stage": "done"' b.raw.replfs/state.json
replfs secondary b.raw b --listen unix:nbd.sock --no-start
is none stage b
replfs start b
cmp b/disk.img a.raw
replfs umount b
