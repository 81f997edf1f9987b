#!/usr/bin/env bash
# Builds the guest whose boot `scripts/bench.sh --only order` measures: a Debian or Ubuntu of this
# machine's release with systemd, udev, an SSH server and a login prompt on the serial line. Its
# kernel, initrd and boot loader are on the disk. target/order-guest/disk.raw is kept while this
# script and the versions of the packages are the same. As root: the root file system is mounted
# while it is filled, so that its blocks lie as an installation leaves them.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export LC_ALL=C

guest=$repo/target/order-guest
size=$((2 << 30))
start=$((1 << 20)) # of the partition; the boot loader lies before it
# Files besides the packages, as an application and its data leave them: MiB in all. With the
# packages they make the boot set a few per cent of what is allocated.
data_mib=700

[[ $(uname -m) == x86_64 ]] || die 'the guest is x86_64, as this machine is not'
((EUID == 0)) || die 'the guest is built as root: it mounts the file system that it fills'
install_missing mmdebstrap sfdisk mkfs.ext4 losetup python3 || die 'cannot go on without'
# shellcheck source=/dev/null
suite=$(source /etc/os-release && echo "${VERSION_CODENAME:?}")
# shellcheck source=/dev/null
kernel=$(source /etc/os-release && case $ID in ubuntu) echo linux-image-virtual ;; *) echo linux-image-cloud-amd64 ;; esac)

# What the guest runs, and what fills it.
boots=("$kernel" initramfs-tools systemd systemd-sysv udev dbus openssh-server grub-pc-bin grub2-common
    ifupdown isc-dhcp-client iproute2 cron rsyslog libpam-systemd e2fsprogs kmod less)
fills=(g++ git python3 vim perl gdb man-db)

# The version of the kernel's meta package is that of the kernel.
ingredients() {
    apt-cache policy "${boots[@]}" "${fills[@]}" | awk '/^[^ ]/ { name = $1 } /Candidate:/ { print name, $2 }'
    cksum <"${BASH_SOURCE[0]}"
}
apt-cache show "$kernel" >/dev/null 2>&1 || apt-get update -qq || true
if [[ -e $guest/made-of && $(<"$guest/made-of") == "$(ingredients)" ]]; then
    printf 'already here: %s\n' "$guest/disk.raw"
    exit 0
fi

mkdir -p "$guest"
work=$(mktemp -d "$guest/work.XXXXXX")
root=$work/root
loop='' builder=''
clean_up() {
    if [[ -n $builder ]]; then
        kill -TERM -- "-$builder" 2>/dev/null || true
        wait "$builder" || true
    fi
    # Whatever a failed installation has left mounted, innermost first.
    awk -v root="$root" '$2 == root || index($2, root "/") == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r path; do umount "$path" || umount -l "$path"; done
    [[ -z $loop ]] || losetup -d "$loop" || true
    # Nothing is removed below a mount that could not be undone.
    mountpoint_is_busy "$root" || rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
rm -f "$guest/made-of"

disk=$work/disk.raw
truncate -s $size "$disk"
printf 'label: dos\nlabel-id: 0x0bde2026\nstart=%d, type=83, bootable\n' $((start / 512)) | sfdisk -q "$disk"
loop=$(losetup -f --show -o $start --sizelimit $((size - start)) "$disk")
mkfs.ext4 -q -L root -U 0bde2026-0000-4000-8000-000000000001 "$loop"
mkdir "$root"
mount "$loop" "$root"

printf 'installing %s: %s\n' "$suite" "${boots[*]} ${fills[*]}"
# shellcheck disable=SC2016 # $1 is of the hook: the root
fill='chroot "$1" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends '"${fills[*]}"' >/dev/null'
include=$(printf '%s,' "${boots[@]}")
# What fills the disk comes after what boots, as in most images.
# In the background, because bash obeys a signal only between its commands, and in a session of its
# own, which ends as a whole.
setsid mmdebstrap --quiet --variant=minbase --mode=root --skip=check/empty --include="${include%,}" \
    --customize-hook="$fill" "$suite" "$root" &
builder=$!
wait "$builder"
builder=''

echo guest >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 guest\n' >"$root/etc/hosts"
echo '/dev/vda1 / ext4 defaults 0 1' >"$root/etc/fstab"
# A network that is not there would be waited for.
printf 'auto lo\niface lo inet loopback\n' >"$root/etc/network/interfaces"
chroot "$root" systemctl enable --quiet serial-getty@ttyS0.service ssh.service
chroot "$root" passwd -q -d root
# An image is the same for each machine: the first boot of each makes its own identity.
: >"$root/etc/machine-id"

# The data: sizes from 16 KiB to 16 MiB, and content that does not compress.
python3 - "$root/srv" $data_mib <<'END'
import os, random, sys

root, left = sys.argv[1], int(sys.argv[2]) << 20
draw, number = random.Random(1), 0
while left > 0:
    size = min(left, 1 << draw.randrange(14, 25))
    directory = "%s/%02d" % (root, number % 16)
    os.makedirs(directory, exist_ok=True)
    with open("%s/%05d.bin" % (directory, number), "wb") as file:
        file.write(draw.randbytes(size))
    left, number = left - size, number + 1
END

# The boot loader, as grub-install puts it: boot.img in the first sector, core.img in the gap before
# the partition, the modules in the file system. grub-install itself wants to see the partition as a
# device with its disk, which containers do not show. diskboot.img, the head of core.img, expects
# the rest of it in the sectors that follow, and grub-mkimage writes the length there.
modules=/usr/lib/grub/i386-pc
mkdir -p "$root/boot/grub/i386-pc"
cp "$root$modules"/*.mod "$root$modules"/*.lst "$root/boot/grub/i386-pc/"
chroot "$root" grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /boot/grub/i386-pc/core.img biosdisk part_msdos ext2
cp "$root$modules/boot.img" "$root/boot/grub/i386-pc/boot.img"
vmlinuz=$(find "$root/boot" -name 'vmlinuz-*' -printf '%f\n' | sort -V | tail -1)
cat >"$root/boot/grub/grub.cfg" <<END
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
menuentry guest {
    insmod gzio
    insmod part_msdos
    insmod ext2
    linux /boot/$vmlinuz root=/dev/vda1 ro console=ttyS0 quiet
    initrd /boot/initrd.img-${vmlinuz#vmlinuz-}
}
END
cp "$root/boot/grub/i386-pc"/{boot,core}.img "$work/"
(($(stat -c %s "$work/core.img") <= start - 512)) || die 'core.img does not fit before the partition'

du -shx "$root" | awk '{ print "in the file system: " $1 }'
umount "$root"
losetup -d "$loop"
loop=''
dd if="$work/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$work/core.img" of="$disk" bs=512 seek=1 conv=notrunc status=none
sync "$disk"
mv "$disk" "$guest/disk.raw"
ingredients >"$guest/made-of"
printf 'made: %s, %s of it allocated\n' "$guest/disk.raw" "$(human "$(on_disk "$guest/disk.raw")")"
