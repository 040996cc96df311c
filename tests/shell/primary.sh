# The primary: its own disk always counts, and what happens to the link fails no write.
# expects: the link (to .* )?is (given up|lost)
# expects: no link: 
# expects: is the secondary running there
. "$(dirname "$0")/lib.sh"

dd if=/dev/urandom of=a.raw bs=1000003 count=3
cp a.raw b.raw
cp a.raw small.raw
truncate -s -1 small.raw
mkdir a b

# A secondary that is there has to have that export and that size. One that is not is waited for.
replfs secondary b.raw b --listen unix:nbd.sock --export vm1
refused "no export of that name" replfs primary a.raw a --target 'nbd+unix:///disk?socket=nbd.sock'
refused 'has 3000008 bytes' replfs primary small.raw a --target 'nbd+unix:///vm1?socket=nbd.sock'
grep 'has 3000009' said
refused 'unencrypted' replfs primary a.raw a --target nbd://192.0.2.1/vm1
[ "$status" = 2 ]
[ ! -e a.raw.replfs ] && [ ! -e small.raw.replfs ]
replfs umount b
replfs primary a.raw a --target 'nbd+unix:///vm1?socket=nbd.sock' 2>said
grep 'is the secondary running there?; going on alone\|is the secondary running there?: going on alone' said
replfs status a | grep 'link: *connecting'
replfs umount a
rm -r a.raw.replfs b.raw.replfs
replfs secondary b.raw b --listen unix:nbd.sock --export vm1

# Any offset and length is forwarded, up to the odd last byte.
primary a.raw a 'nbd+unix:///vm1?socket=nbd.sock' --name vm1.img --mode 0640
[ "$(stat -c '%s %a' a/vm1.img)" = '3000009 640' ]
for block in '1 3000008' '7 428571' '4097 511' '65537 3' '1000003 0'; do
    dd if=/dev/urandom of=a/vm1.img bs="${block% *}" seek="${block#* }" count=1 conv=notrunc
    cmp a/vm1.img a.raw
    cmp a/vm1.img b.raw
done

# Without the link writes succeed, and are only on the primary's disk. The error is told.
replfs umount b
dd if=/dev/urandom of=a/vm1.img bs=64k seek=7 count=3 conv=notrunc,fsync
is 'I/O error occurred' error a
is running stage a
replfs status a | grep -x 'error: *I/O error occurred'
replfs status a | grep 'link: *connecting'
replfs status a | grep 'link error: '
replfs status a | grep 'out of sync: *[0-9.]* [KM]iB'
cmp a/vm1.img a.raw
refused differ cmp a.raw b.raw

# The next mount says the same, until the secondary has what it lacks.
replfs umount a
replfs primary a.raw a --target 'nbd+unix:///vm1?socket=nbd.sock' 2>said
is 'I/O error occurred' error a
replfs secondary b.raw b --listen unix:nbd.sock --export vm1
replfs resync --wait a
is '' error a
cmp a.raw b.raw
replfs failover a
is done stage a
is '' error a

# Then it is its own disk's alone.
cp b.raw before.raw
dd if=/dev/urandom of=a/disk.img bs=64k count=3 conv=notrunc
cmp a/disk.img a.raw
cmp b.raw before.raw
is '' error a
replfs umount a
replfs umount b
