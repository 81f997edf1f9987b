#!/usr/bin/env bash
# Fetches what a real guest is made of: the kernel and the static busybox of this distribution, from
# its own packages. target/guest/ has then: vmlinuz, busybox, initramfs.gz (boots the ext4 file
# system on /dev/vda). Nothing is installed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

guest=$repo/target/guest
# What the initramfs needs to find and mount the disk: as a PCI device (QEMU, cloud-hypervisor) or
# without a bus (Firecracker).
modules=(virtio_pci virtio_mmio virtio_blk crc32c_generic ext4)

[[ $(uname -m) == x86_64 ]] || die 'guests are x86_64, as this machine is not'
for tool in apt-get apt-cache dpkg-deb; do
    have "$tool" || die "$tool is not here: the kernel and busybox come from packages of Debian or Ubuntu"
done

# kernel_packages: the packages of the newest kernel for virtual machines: the image, on Ubuntu also
# the modules.
kernel_packages() {
    local name
    for name in linux-image-cloud-amd64 linux-image-virtual linux-image-amd64; do
        apt-cache depends --recurse --important "$name" 2>/dev/null | grep -xE 'linux-(image|modules)-[0-9][^ ]*' | sort -u | grep . && return 0
    done
    return 1
}

mapfile -t packages < <(kernel_packages)
if ((${#packages[@]} == 0 && EUID == 0)); then
    apt-get update -qq || true
    mapfile -t packages < <(kernel_packages)
fi
((${#packages[@]})) || die 'apt knows no kernel package; as root: apt-get update'
packages+=(busybox-static)
# What the result depends on: the versions of the packages, and this script.
ingredients() {
    apt-cache policy "${packages[@]}" | awk '/^[^ ]/ { name = $1 } /Candidate:/ { print name, $2 }'
    cksum <"${BASH_SOURCE[0]}"
}
if [[ -e $guest/made-of && $(<"$guest/made-of") == "$(ingredients)" ]]; then
    printf 'already here: %s\n' "${packages[*]}"
    exit 0
fi

mkdir -p "$guest"
work=$(mktemp -d "$guest/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
rm -f "$guest/made-of"
sandbox=()
((EUID)) || sandbox=(-o APT::Sandbox::User=root) # apt's own user may not write here
printf 'fetching %s\n' "${packages[*]}"
download() { (cd "$work" && apt-get "${sandbox[@]}" download -qq "${packages[@]}"); }
if ! download; then
    ((EUID == 0)) || die 'apt cannot fetch them; its lists may be old, then as root: apt-get update'
    apt-get update -qq
    # What is newest now may have another name.
    mapfile -t packages < <(kernel_packages)
    packages+=(busybox-static)
    download || die "apt cannot fetch ${packages[*]}"
fi
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/x"; done

first_of() { # first_of FILE...: the first one that exists
    local file
    for file in "$@"; do [[ -e $file ]] && echo "$file" && return 0; done
    return 1
}
busybox=$(first_of "$work"/x/{usr/,}bin/busybox) || die 'no busybox in busybox-static'
vmlinuz=$(first_of "$work"/x/boot/vmlinuz-*) || die "no kernel in ${packages[*]}"
tree=$(first_of "$work"/x/{usr/,}lib/modules/*) || die "no modules in ${packages[*]}"

root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,run,root,modules}
install -m 755 "$busybox" "$root/bin/busybox"

# add_module NAME: it and what it depends on, in the order of loading. What is built into the kernel
# has no file.
: >"$root/modules/order"
add_module() {
    local name=$1 file dependencies dependency target=$root/modules/$1.ko
    [[ ! -e $target ]] || return 0
    file=$(find "$tree/kernel" \( -name "$name.ko*" -o -name "${name//_/-}.ko*" \) -print -quit)
    case $file in
        '') return 0 ;;
        *.ko) cp "$file" "$target" ;;
        *.xz) "$busybox" xz -dc "$file" >"$target" ;;
        *.gz) gzip -dc "$file" >"$target" ;;
        *.zst) zstd -qdc "$file" >"$target" ;;
        *) die "cannot unpack $file" ;;
    esac
    dependencies=$(tr '\0' '\n' <"$target" | sed -n 's/^depends=//p' | tr ',-' ' _')
    for dependency in $dependencies; do add_module "$dependency"; done
    echo "$name" >>"$root/modules/order"
}
for module in "${modules[@]}"; do add_module "$module"; done

cat >"$root/init" <<'END'
#!/bin/busybox sh
# Mounts the disk and hands over to the init that is on it.
b=/bin/busybox # until it has its names
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t tmpfs tmpfs /run
$b mkdir /run/bin
$b --install -s /run/bin
export PATH=/run/bin
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "@ FAILED to load $module"; done
tries=0
until [ -b /dev/vda ] || [ $tries = 100 ]; do sleep 0.1; tries=$((tries + 1)); done
if mount -t ext4 /dev/vda /root; then
    for dir in proc sys dev run; do mount --move /$dir /root/$dir; done
    exec /bin/busybox switch_root /root /sbin/init
fi
echo "@ FAILED to mount the disk"
poweroff -f
END
chmod 755 "$root/init"
(cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$guest/initramfs.gz"
install -m 644 "$vmlinuz" "$guest/vmlinuz"
install -m 755 "$busybox" "$guest/busybox"
ingredients >"$guest/made-of"
printf 'modules: %s\n' "$(tr '\n' ' ' <"$root/modules/order")"
du -Lh "$guest"/{vmlinuz,busybox,initramfs.gz}
