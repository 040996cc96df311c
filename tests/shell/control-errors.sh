# Control that is refused: the errno that setfattr shows, the message in last-error, and what the commands say.
# expects: (start|checkpoint|failover|stop|user\.\S+) failed: 
. "$(dirname "$0")/lib.sh"

truncate -s 4M b.raw
mkdir b elsewhere
replfs secondary b.raw b --listen unix:nbd.sock --no-start

# In stage none, everything but start. The messages are QEMU's.
is '' last-error b
is 'Block replication is not running' error b
refused 'Device or resource busy' setfattr -n user.replfs.failover -v 1 b
is 'Block replication is not running' last-error b
refused 'Device or resource busy' setfattr -n user.replfs.checkpoint -v 1 b/disk.img
is 'Backup job was cancelled unexpectedly' last-error b
refused 'replfs: error: Block replication is not running' replfs stop b
refused 'Invalid argument' setfattr -n user.replfs.start -v primary b
is "The parameter mode's value is invalid, needs 1, but got 0" last-error b
refused 'Invalid argument' setfattr -n user.replfs.start -v tertiary b
is "start takes the value primary or secondary, not 'tertiary'" last-error b
is none stage b

# A start that was refused can be repeated, and what succeeds clears the last error.
setfattr -n user.replfs.start -v secondary b
is '' last-error b
is '' error b
refused 'Device or resource busy' setfattr -n user.replfs.start -v secondary b
is 'Block replication is running or done' last-error b
refused 'replfs: error: Block replication is running or done' replfs start b
is running stage b
replfs status b | grep -x 'last error: *Block replication is running or done'

# What is no control, cannot be read, or cannot be set.
refused 'Operation not supported' setfattr -n user.replfs.commit -v 1 b
is 'there is no control user.replfs.commit' last-error b
refused 'Operation not supported' setfattr -n user.replfs.stage -v done b
refused 'Operation not supported' setfattr -n user.comment -v hello b
refused 'Operation not supported' setfattr -x user.replfs.stage b
refused 'No such attribute' getfattr -n user.replfs.checkpoint b
getfattr -d b/disk.img >all
[ "$(grep -c '^user\.replfs\.' all)" = 6 ]
is running stage b

# The commands, where they cannot work.
refused 'replfs: error: elsewhere is not a mount of replfs' replfs status elsewhere
refused 'replfs: error: nowhere: No such file or directory' replfs checkpoint nowhere
refused 'No such command' replfs demote b
[ "$status" = 2 ]
refused 'Missing option' replfs promote b
[ "$status" = 2 ]
refused 'Missing argument' replfs failover
[ "$status" = 2 ]
refused 'No such option' replfs checkpoint b --hard
[ "$status" = 2 ]

# A file in use cannot be unmounted.
exec 3<b/disk.img
refused 'busy' replfs umount b
exec 3<&-
replfs umount b
