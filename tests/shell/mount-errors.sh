# A mount that is refused says why in one line, and leaves nothing behind.
. "$(dirname "$0")/lib.sh"

truncate -s 4M b.raw c.raw
mkdir b c
replfs secondary b.raw b --listen unix:nbd.sock

# Nothing is mounted twice, over something, from nothing, or as something else.
refused 'b.raw is in use by another process' replfs secondary b.raw c --listen unix:other.sock
refused 'is busy: something is mounted there already' replfs secondary c.raw b --listen unix:other.sock
refused 'nbd.sock is in use by another server' replfs secondary c.raw c --listen unix:nbd.sock
refused 'No such file or directory' replfs secondary missing.raw c --listen unix:other.sock
refused 'No such file or directory' replfs secondary c.raw missing --listen unix:other.sock
refused 'is not a directory' replfs secondary c.raw c.raw --listen unix:other.sock
qemu-img create -q -f qcow2 d.qcow2 4M
refused 'looks like a qcow2 image' replfs secondary d.qcow2 c --listen unix:other.sock
[ ! -e c.raw.replfs ] && [ ! -e d.qcow2.replfs ] && [ ! -e other.sock ]
is running stage b

# A disk keeps its mode and its size.
replfs umount b
refused 'is the state of a secondary volume' replfs primary b.raw b --target 'nbd+unix:///disk?socket=nbd.sock'
truncate -s 5M b.raw
refused 'size has changed from 4194304 to 5242880 bytes' replfs secondary b.raw b --listen unix:nbd.sock

# Wrong usage.
truncate -s 4M b.raw
refused 'tertiary' replfs secondary b.raw b --listen tertiary
[ "$status" = 2 ]
refused 'unencrypted' replfs secondary b.raw b --listen 192.0.2.1:10809
[ "$status" = 2 ]
refused 'is not a FUSE mount option that replfs knows' replfs secondary b.raw b -o frobnicate
[ "$status" = 2 ]
