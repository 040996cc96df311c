#!/bin/sh
# A small Linux guest for tests of virtual machines: Debian's cloud kernel, and an initramfs with busybox, mke2fs and e2fsck.
#
#   scripts/vm-guest.sh [DIRECTORY]    makes DIRECTORY/vmlinuz and DIRECTORY/initrd, once; .venv/vm of this checkout by default
#
# The kernel's package is downloaded and unpacked, not installed. The guest works on its first virtio disk, /dev/vda, does what the
# kernel's command line tells it, and says on its console how that went:
#
#   replfs.do=make     makes a file system with files in it:                       GUEST: WRITTEN <checksum of the files>
#                      then writes and syncs numbered files until it is killed:    GUEST: LATER <number>
#   replfs.do=check    mounts what a killed guest has left:                        GUEST: REPLAYED    (its journal, that is)
#                      looks for the numbered files, from 1 without a gap:         GUEST: LATER <the last one>
#                      writes one more file, unmounts, runs e2fsck -fn, ends:      GUEST: CLEAN <checksum of the files>
#
# Whatever fails ends it with GUEST: FAILED <reason>.
set -eu
guest=${1:-"$(dirname "$0")/../.venv/vm"}
PATH="$PATH:/usr/sbin:/sbin" # an ordinary user's lacks them
LC_ALL=C
export PATH LC_ALL

fail() {
    echo "error: $1" >&2
    exit 1
}

mkdir -p "$guest"
exec 9>"$guest/lock" # whoever comes while it is being made waits, and finds it
flock -w 300 9 || fail "somebody else has been making $guest for 300 seconds"
[ ! "$guest/initrd" -nt "$0" ] || exit 0

work=$(mktemp -d "$guest/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

download() { # the kernel that the package linux-image-cloud-amd64 stands for
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    [ -n "$package" ] && (cd "$work" && timeout 300 apt-get -qq download "$package")
}

if [ ! -e "$guest/kernel.deb" ]; then
    [ "$(dpkg --print-architecture)" = amd64 ] || fail "the guest is for amd64 only"
    # Lists of packages that are old name what is no longer there.
    download >"$work/log" 2>&1 </dev/null ||
        { [ "$(id -u)" = 0 ] && apt-get -qq update && download; } >>"$work/log" 2>&1 </dev/null ||
        { cat "$work/log" >&2; fail "the kernel cannot be downloaded (apt-get update, as root, may help)"; }
    mv "$work"/linux-image-*.deb "$guest/kernel.deb"
fi

tree="$work/kernel"
root="$work/root"
mkdir -p "$tree" "$root/bin" "$root/dev" "$root/mnt" "$root/modules" "$root/proc" "$root/sbin" "$root/tmp"
dpkg -x "$guest/kernel.deb" "$tree"
version=$(basename "$tree"/boot/vmlinuz-*)
version=${version#vmlinuz-}
[ -e "$tree/lib" ] || ln -s usr/lib "$tree/lib"
depmod -b "$tree" "$version"

# What a disk and ext4 need that is not in the kernel itself, each after what it depends on. crc32c is asked for by name, at run
# time, and newer kernels have it inside.
for module in virtio_pci virtio_blk crc32c_generic ext4; do
    modprobe -C /dev/null -d "$tree" -S "$version" --show-depends "$module" || [ $module = crc32c_generic ]
done >"$work/depends" 2>"$work/log" || { cat "$work/log" >&2; fail "a module is missing in the kernel's package"; }
sed -n 's/^insmod \([^ ]*\).*/\1/p' "$work/depends" | awk '!seen[$0]++' >"$work/modules"
while read -r module; do
    name=$(basename "$module")
    case $name in
        *.xz) xz -dc "$module" >"$root/modules/${name%.xz}" ;;
        *) cp "$module" "$root/modules/$name" ;;
    esac
    echo "${name%.xz}" >>"$root/modules/order"
done <"$work/modules"

cp "$(command -v busybox)" "$root/bin/busybox"
for program in mke2fs e2fsck; do
    program=$(command -v $program)
    cp "$program" "$root/sbin"
    for library in $(ldd "$program" | grep -o '/[^ ]*'); do
        mkdir -p "$root${library%/*}"
        cp -L "$library" "$root$library"
    done
done

cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
PATH=/bin
export PATH

say() {
    echo "GUEST: $*"
}

fail() {
    say "FAILED $*"
    poweroff -f
}

sum() { # of the names and contents of the files that come first
    (cd /mnt/data && find . -type f | sort | xargs sha256sum | sha256sum | cut -c 1-64)
}

make() {
    /sbin/mke2fs -q -F -t ext4 /dev/vda || fail "mke2fs" # busybox has one, too, for ext2 only
    mount -t ext4 /dev/vda /mnt || fail "mount"
    mkdir /mnt/data /mnt/later
    head -c 3000000 /dev/urandom >/mnt/data/random
    seq 50000 >/mnt/data/numbers
    number=0
    while [ $number -lt 100 ]; do
        mkdir "/mnt/data/$number" || fail "mkdir"
        echo "file $number" >"/mnt/data/$number/file" || fail "write"
        number=$((number + 1))
    done
    sync
    say "WRITTEN $(sum)"
    number=0
    while :; do
        number=$((number + 1))
        echo $number >/mnt/later/$number || fail "write $number"
        sync
        say "LATER $number"
    done
}

check() {
    mount -t ext4 /dev/vda /mnt || fail "mount"
    dmesg | grep -q 'EXT4-fs (vda): recovery complete' || fail "there was no journal to replay"
    say REPLAYED
    number=0
    while [ "$(cat /mnt/later/$((number + 1)) 2>/dev/null)" = $((number + 1)) ]; do
        number=$((number + 1))
    done
    say "LATER $number"
    sum=$(sum)
    echo "this machine has taken over" >/mnt/taken-over || fail "write"
    umount /mnt || fail "umount"
    /sbin/e2fsck -fn /dev/vda >/tmp/e2fsck 2>&1 || fail "e2fsck: $(cat /tmp/e2fsck)"
    say "CLEAN $sum"
    poweroff -f
}

mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || fail "insmod $module"
done </modules/order
polls=100
until [ -b /dev/vda ]; do
    polls=$((polls - 1))
    [ $polls -gt 0 ] || fail "there is no disk"
    sleep 0.1
done
for word in $(cat /proc/cmdline); do
    case $word in
        replfs.do=make) make ;;
        replfs.do=check) check ;;
    esac
done
fail "nothing to do"
INIT
chmod +x "$root/init"

(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/initrd"
cp "$tree/boot/vmlinuz-$version" "$work/vmlinuz"
mv "$work/vmlinuz" "$work/initrd" "$guest/"
