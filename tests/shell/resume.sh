# The next mount goes on where the last one ended, also when its process was killed: nothing that was answered is lost.
# expects: the link (to .* )?is (given up|lost)
# expects: no link: 
. "$(dirname "$0")/lib.sh"

dd if=/dev/urandom of=a.raw bs=1M count=8
cp a.raw b.raw
mkdir a b
replfs secondary b.raw b --listen unix:nbd.sock
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'
dd if=/dev/urandom of=a/disk.img bs=64k count=10 conv=notrunc
replfs checkpoint b
dd if=/dev/urandom of=a/disk.img bs=64k seek=5 count=10 conv=notrunc
dd if=/dev/urandom of=b/disk.img bs=64k seek=10 count=10 conv=notrunc
cp b/disk.img view.raw
cp a/disk.img disk.raw

# Unmounted and mounted again, the primary first.
replfs umount a
replfs umount b
cmp b.raw disk.raw
replfs secondary b.raw b --listen unix:nbd.sock
is running stage b
is 1 generation b
cmp b/disk.img view.raw
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'
is '' error a
cmp a/disk.img disk.raw

# A killed secondary: the mount is dead, not an empty directory, and the next one shows the very same.
printf 'written before the kill' | dd of=b/disk.img bs=1 seek=77777 conv=notrunc
printf 'written before the kill' | dd of=view.raw bs=1 seek=77777 conv=notrunc
crash "$(process b)" b
refused 'Transport endpoint is not connected' ls b
refused 'its replfs has died' replfs status b
refused 'what was mounted there is dead' replfs secondary b.raw b --listen unix:nbd.sock
replfs umount b
replfs secondary b.raw b --listen unix:nbd.sock
is running stage b
is 1 generation b
cmp b/disk.img view.raw
cmp b.raw disk.raw

# A killed primary cannot know which of its last writes the secondary has, and sends them again.
crash "$(process a)" a
replfs umount a
primary a.raw a 'nbd+unix:///disk?socket=nbd.sock'
is running stage a
is '' error a
cmp a/disk.img disk.raw
cmp b.raw disk.raw
replfs umount a

# A failover whose process is killed goes on at the next mount, wherever it was.
process=$(process b)
setfattr -n user.replfs.failover -v 1 b
crash "$process" b
replfs umount b
replfs secondary b.raw b --listen unix:nbd.sock
becomes done stage b
cmp b/disk.img view.raw
replfs umount b
cmp b.raw view.raw
