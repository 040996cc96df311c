# A failover: the secondary's file goes on as it is, its disk becomes the same, and the old primary is kept out.
# expects: the link (to .* )?is (given up|lost)
# expects: no link: 
. "$(dirname "$0")/lib.sh"

dd if=/dev/urandom of=a.raw bs=1M count=24
cp a.raw b.raw
mkdir a b c
replfs secondary b.raw b --listen unix:nbd.sock
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'

# The primary writes, a checkpoint, and it writes more: the failover goes back to the checkpoint.
dd if=/dev/urandom of=a/disk.img bs=64k count=20 conv=notrunc
setfattr -n user.replfs.checkpoint -v 1 b
cp b/disk.img expected.raw
dd if=/dev/urandom of=a/disk.img bs=64k seek=10 count=100 conv=notrunc

# The secondary writes too, and goes on through the same open file.
dd if=/dev/urandom of=own bs=1M count=6
dd if=own of=expected.raw bs=1M seek=9 conv=notrunc
dd if=own of=b/disk.img bs=1M seek=9 conv=notrunc
cmp b/disk.img expected.raw
exec 3<>b/disk.img
setfattr -n user.replfs.failover -v 1 b/disk.img
for n in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
    echo "written during the failover: $n" >text
    dd if=text of=expected.raw bs=1M seek="$n" conv=sync,notrunc
    dd if=text bs=1M conv=sync,notrunc >&3
done
cmp b/disk.img expected.raw
becomes done stage b
is '' error b
exec 3>&-
cmp b/disk.img expected.raw
cmp b.raw expected.raw

# The old primary still has its disk, and reaches nobody: not with what it has open, not anew.
echo 'from the old primary' | dd of=a/disk.img conv=notrunc
dd if=a.raw bs=21 count=1 | grep 'from the old primary'
cmp b.raw expected.raw
is 'I/O error occurred' error a
refused 'has taken over' replfs resync --wait a
replfs status a | grep -E 'link error: .*has taken over'
cp a.raw c.raw
refused 'has taken over' replfs primary c.raw c --target 'nbd+unix:///disk?socket=nbd.sock'

# It cannot be undone, or be done twice.
for control in start checkpoint failover stop; do
    replfs "$control" b
done
is done stage b
cmp b/disk.img expected.raw

# From here on it is a disk like any other, also at the next mount.
dd if=own of=expected.raw bs=1M seek=1 conv=notrunc
dd if=own of=b/disk.img bs=1M seek=1 conv=notrunc
cmp b.raw expected.raw
replfs umount a
replfs umount b
replfs secondary b.raw b --listen unix:nbd.sock
is done stage b
cmp b/disk.img expected.raw
replfs umount b
cmp b.raw expected.raw
[ "$(ls b.raw.replfs)" = "$(printf 'replfs.log\nstate.json\nstate.json.new\ntracking')" ]
