#!/bin/busybox sh
# The init of the guest in real_guest.rs: /sbin/init of the disk under test. Lines that begin with
# "@ " are messages to the test. The test can compute the content that this script writes:
# generate() here equals content() there.
# Words on the kernel's command line: cordisk.seed=NUMBER cordisk.rounds=NUMBER
export PATH=/run/bin
for word in $(cat /proc/cmdline); do
    case $word in
        cordisk.seed=*) seed=${word#*=} ;;
        cordisk.rounds=*) rounds=${word#*=} ;;
    esac
done

fail() {
    echo "@ FAILED: $*"
    poweroff -f
}

# generate KIND ROUND LINES: each line identifies its file and its position
generate() { seq 1 "$3" | sed "s/^/$seed $1 $2 /"; }

verify() { (cd / && sha256sum -c "/$1" >/run/verified 2>&1) || fail "content of $1: $(grep -v ': OK' /run/verified)"; }

mount -o remount,rw,discard / || fail 'remount for writing'
echo "@ UP $(uname -r)"

# These files come from the golden image, through copy-on-read.
verify sums.read
echo "@ VERIFIED"

# The test ends the rounds with a line on the console.
(read -r word </dev/console && : >/run/enough) &

round=0
while [ ! -e /run/enough ]; do
    if [ $round -ge "$rounds" ]; then
        sleep 0.1
        continue
    fi
    round=$((round + 1))
    echo "@ WRITES $round"
    generate new $round 12000 | dd of=/new/$round bs=64k iflag=fullblock conv=fsync 2>/dev/null || fail "write of /new/$round"
    # Overwrites in place, not aligned to clusters, in four files by turns.
    generate over $round 6000 | dd of=/golden/change/$((round % 4)) bs=4k seek=$((round * 64 + 3)) iflag=fullblock conv=notrunc,fsync 2>/dev/null ||
        fail "overwrite of round $round"
    sync
    echo "@ SYNCED $round"
done
echo "@ ROUNDS $round"

# Verifies again, from the disk and not from memory, and now also files that were never read.
fstrim / || fail fstrim
echo 3 >/proc/sys/vm/drop_caches
verify sums.read
verify sums.hold
find /new /golden/change -type f | while read -r name; do echo "@ SUM $(sha256sum "$name")"; done
mount -o remount,ro / || fail 'remount for reading only'
sync
echo "@ DONE"
poweroff -f
