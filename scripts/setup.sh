#!/bin/sh
# Make this checkout ready to run: Debian packages (installed when run as root, named otherwise), and a virtual environment in .venv
# with replfs and what PACKAGES adds to it. Doing it again costs a second.
#
#   scripts/setup.sh [test|bench|vm]   also what the tests need, which includes a short form of the benchmark, and the demo with
#                                      virtual machines; or the benchmark alone; or that demo alone
set -eu
cd "$(dirname "$0")/.."

packages="python3 python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3 attr e2fsprogs"
machines="qemu-system-x86 busybox-static cpio kmod xz-utils" # QEMU, and what makes a guest for it
extra=""
case ${1:-} in
    test)
        packages="$packages qemu-utils nbdkit libnbd-bin python3-libnbd fio $machines"
        extra="[test]"
        ;;
    bench) packages="$packages qemu-utils nbdkit qemu-system-x86 fio" ;;
    vm) packages="$packages $machines" ;;
esac

missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "error: these Debian packages are missing; install them as root with: apt-get install$missing" >&2
        exit 1
    fi
    echo "installing:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update </dev/null
    # shellcheck disable=SC2086
    apt-get -qq install -y --no-install-recommends $missing </dev/null >/dev/null
fi

stamp=".venv/ready${1:+-$1}"
[ -e .venv/ready-test ] && stamp=.venv/ready-test # which is more than enough
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "making .venv"
    # Debian's own, whatever comes first in PATH: its headers are what was installed above, and it is built for speed.
    python=/usr/bin/python3
    $python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than 3.11" >&2; exit 1; }
    [ -x .venv/bin/python ] || $python -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extra" </dev/null
    touch "$stamp"
fi
