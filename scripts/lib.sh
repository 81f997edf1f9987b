# Shared by the scripts beside it; to be sourced, not run. Defines: repo, bold/dim/plain, headings,
# and the installation of missing tools.
# shellcheck shell=bash disable=SC2034 # the scripts that source this file use what it sets

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
else
    bold='' dim='' red='' green='' plain=''
fi

die() {
    printf '%s%s: %s%s\n' "$red" "$(basename "$0")" "$*" "$plain" >&2
    exit 1
}

# Directories with administration tools are not in everybody's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# have TOOL: whether it is there. `venv` and `ensurepip` are modules of Python, packaged apart by
# Debian, and so are those of Ceph and the plugin of nbdkit.
have() {
    case $1 in
        python3-venv) python3 -c 'import venv, ensurepip' >/dev/null 2>&1 ;;
        python3-rbd) /usr/bin/python3 -c 'import rados, rbd' >/dev/null 2>&1 ;; # the Python of nbdkit
        nbdkit-plugin-python) nbdkit python --dump-plugin >/dev/null 2>&1 ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# package_of TOOL: the Debian and Ubuntu package that has it.
package_of() {
    case $1 in
        cc) echo 'gcc libc6-dev' ;;
        qemu-img | qemu-io | qemu-nbd) echo qemu-utils ;;
        # Debian 13 and later have it in qemu-utils, Debian 12 and Ubuntu in qemu-system-common. See
        # install_missing.
        qemu-storage-daemon) echo qemu-utils ;;
        qemu-system-x86_64) echo qemu-system-x86 ;;
        fusermount3) echo fuse3 ;;
        mkfs.ext4 | e2fsck | debugfs | dumpe2fs | filefrag) echo e2fsprogs ;;
        mount | umount | losetup) echo mount ;;
        sfdisk) echo fdisk ;;
        mkfs.vfat) echo dosfstools ;;
        findmnt | blkdiscard | fallocate | fstrim | setpriv | setsid | fsfreeze | unshare | nsenter) echo util-linux ;;
        fincore) echo util-linux-extra ;;
        mkfs.xfs | xfs_io | xfs_repair) echo xfsprogs ;;
        mkfs.btrfs) echo btrfs-progs ;;
        nbdfuse | nbdcopy | nbdinfo) echo libnbd-bin ;;
        nginx) echo nginx-light ;;
        rbd | ceph | radosgw-admin | ceph-authtool | monmaptool) echo ceph-common ;;
        setfattr | getfattr) echo attr ;;
        man) echo man-db ;;
        groff) echo groff-base ;;
        systemd-analyze) echo systemd ;;
        strip) echo binutils ;;
        *) echo "$1" ;;
    esac
}

missing_of() {
    local tool
    for tool in "$@"; do have "$tool" || echo "$tool"; done
}

# apt_install PACKAGE...: starts no server that a package brings. Tests start their own, on ports of
# 127.0.0.1, and nginx of Debian would answer at port 80 of all addresses.
apt_install() (
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy && ! -L $policy ]]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    had_nginx=''
    ! have nginx || had_nginx=1
    status=0
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends --no-remove "$@" >/dev/null || status=$?
    # Nor does it start with the machine.
    if [[ -z $had_nginx ]] && have nginx && have systemctl; then
        systemctl disable --quiet nginx.service 2>/dev/null || true
    fi
    exit "$status"
)

# backports_of PACKAGE: the suite of Debian's backports that an installed package comes from
# (bookworm-backports); nothing if it does not.
backports_of() {
    [[ $(dpkg-query -W -f '${Version}' "$1" 2>/dev/null) == *~bpo* ]] || return 0
    # shellcheck source=/dev/null
    (source /etc/os-release && echo "${VERSION_CODENAME:?}-backports")
}

# apt_install_from SUITE PACKAGE...: from a suite that this machine need not be subscribed to, and
# what the packages need from its own suites. Sources and lists of the machine stay as they are:
# those with SUITE live in a directory that is gone afterwards.
apt_install_from() {
    local suite=$1 dir status=0 site
    shift
    dir=$(mktemp -d)
    mkdir -p "$dir/lists/partial"
    [[ ! -e /etc/apt/sources.list ]] || cp /etc/apt/sources.list "$dir/sources.list"
    # shellcheck disable=SC2016 # these are variables of apt
    site=$(apt-get indextargets --format '$(RELEASE) $(SITE)' 'Created-By: Packages' | awk -v of="${suite%-backports}" '$1 == of { print $2; exit }')
    printf '\ndeb %s %s main\n' "${site:-http://deb.debian.org/debian}" "$suite" >>"$dir/sources.list"
    local options=(-o Dir::Etc::SourceList="$dir/sources.list" -o Dir::State::Lists="$dir/lists" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update -qq && apt_install "${options[@]}" -t "$suite" "$@" || status=$?
    rm -rf "$dir"
    return $status
}

# install_missing TOOL...: afterwards every tool is there, or it returns 1 after one line that says
# what is missing and what installs it. Installs nothing that is there, removes and replaces
# nothing, and asks nobody.
install_missing() {
    local missing tool packages=()
    mapfile -t missing < <(missing_of "$@")
    ((${#missing[@]})) || return 0
    for tool in "${missing[@]}"; do
        # shellcheck disable=SC2207 # a list of package names
        packages+=($(package_of "$tool"))
    done
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
    if ! have apt-get || ((EUID != 0)); then
        printf 'missing: %s (as root: apt-get install %s)\n' "${missing[*]}" "${packages[*]}" >&2
        return 1
    fi
    printf 'installing with apt: %s\n' "${packages[*]}"
    apt-get update -qq || echo 'apt-get update failed; trying with the lists that are here' >&2
    # QEMU's packages are all of one version: where qemu-utils is from the backports, those of the
    # stable suite would have it removed.
    local package qemu=() suite
    suite=$(backports_of qemu-utils)
    if [[ -n $suite ]]; then
        mapfile -t qemu < <(printf '%s\n' "${packages[@]}" | grep '^qemu-')
        mapfile -t packages < <(printf '%s\n' "${packages[@]}" | grep -v '^qemu-')
        ((${#qemu[@]} == 0)) || apt_install_from "$suite" "${qemu[@]}" || true
    fi
    # One by one where all at once does not work, so that one unknown name does not take the others
    # with it.
    if ((${#packages[@]})) && ! apt_install "${packages[@]}"; then
        for package in "${packages[@]}"; do apt_install "$package" || true; done
    fi
    # Not in this release's qemu-utils: then it is in qemu-system-common, of the same version.
    if [[ " ${missing[*]} " == *' qemu-storage-daemon '* ]] && ! have qemu-storage-daemon; then
        apt_install qemu-system-common || true
    fi
    mapfile -t missing < <(missing_of "$@")
    ((${#missing[@]} == 0)) && return 0
    printf 'still missing after apt-get install: %s\n' "${missing[*]}" >&2
    return 1
}

# cordisk_mounts: mountpoints of type fuse.cordisk, one per line, as the kernel escapes them.
cordisk_mounts() {
    awk '$3 == "fuse.cordisk" { print $2 }' /proc/self/mounts | sort
}

# unmount PATH: whatever right it takes. Nothing mounted there is fine.
unmount() {
    mountpoint_is_busy "$1" || return 0
    if ((EUID == 0)); then umount "$1"; else fusermount3 -u "$1"; fi
}

mountpoint_is_busy() {
    local path
    path=$(realpath -s "$1")
    awk -v path="$path" '$2 == path { found = 1 } END { exit !found }' /proc/self/mounts
}

# human BYTES
human() {
    awk -v n="$1" 'BEGIN { split("B KiB MiB GiB TiB", unit); for (i = 1; n >= 1024 && i < 5; i++) n /= 1024
                           printf (i == 1 || n >= 100 ? "%d %s" : "%.1f %s"), n, unit[i] }'
}

# on_disk FILE: bytes that it occupies
on_disk() {
    echo $(($(stat -Lc '%b * %B' "$1")))
}
