#!/usr/bin/env bash
# A table of fio figures: plain file, cordisk, and qemu-storage-daemon where it is installed. A start; it asserts no figure.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/bench.sh [--size MIB] [--rounds N] [--seconds S] [--targets LIST]

Runs fio on a plain file, on a disk mounted by cordisk, and on one exported by qemu-storage-daemon
(FUSE), in turns, and prints the median of the rounds and how cordisk compares.
Figures drift from hour to hour: only ratios within one run mean something.

  --size MIB      size of the disk (default 512)
  --rounds N      rounds, interleaved (default 3)
  --seconds S     runtime of one measurement (default 1.5; first touch takes what it takes)
  --targets LIST  of plain,cordisk,qsd (default: all that are installed)
  -h, --help      this text

TMPDIR decides where the images lie. On tmpfs the noise of the disk is gone.
END
}

size_mib=512 rounds=3 seconds=1.5 targets=''
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --size | --rounds | --seconds | --targets)
            (($# > 1)) || { usage >&2 && exit 2; }
            case $1 in
                --size) size_mib=$2 ;;
                --rounds) rounds=$2 ;;
                --seconds) seconds=$2 ;;
                --targets) targets=$2 ;;
            esac
            shift 2
            ;;
        *) usage >&2 && exit 2 ;;
    esac
done

install_missing fio qemu-img python3 fusermount3 || die "cannot go on without"
if [[ -z $targets ]]; then
    targets=plain,cordisk
    have qemu-storage-daemon && targets+=,qsd
fi
IFS=, read -ra targets <<<"$targets"

if [[ " ${targets[*]} " == *' cordisk '* ]]; then
    (cd "$repo" && cargo build --release --locked --quiet)
fi
cordisk=${CARGO_TARGET_DIR:-$repo/target}/release/cordisk

work=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/cordisk-bench.XXXXXX")")
cd "$work"
daemon='' # the process that holds the disk of the moment

finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM # cleaning up takes a moment and is not to be cut short
    take_down || true
    cd /
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# put_up TARGET IMAGE warm|cold: afterwards the disk is the file $disk. Cold: IMAGE is an empty overlay, reads copy up.
put_up() {
    disk=$work/disk
    case $1 in
        plain)
            disk=$work/$2
            return
            ;;
        cordisk)
            "$cordisk" mount -f "$2" disk 2>>cordisk.log &
            daemon=$!
            ;;
        qsd)
            : >disk
            local filter=() node=top
            if [[ $3 == cold ]]; then
                filter=(--blockdev "driver=copy-on-read,node-name=cor,file=top") node=cor
            fi
            qemu-storage-daemon --blockdev "driver=qcow2,node-name=top,file.driver=file,file.filename=$2,file.aio=threads,discard=unmap" \
                "${filter[@]}" --export "fuse,id=e,node-name=$node,mountpoint=$disk,writable=on" &
            daemon=$!
            ;;
    esac
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        mountpoint_is_busy disk && return
        kill -0 "$daemon" 2>/dev/null || die "$1 did not start"
        sleep 0.05
    done
    die "$1 did not mount within 10 s"
}

take_down() {
    [[ -n $daemon ]] || return 0
    unmount "$work/disk" || true
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        kill -0 "$daemon" 2>/dev/null || break
        # qemu-storage-daemon stays when its export is unmounted.
        ((tries == 10)) && kill "$daemon" 2>/dev/null
        sleep 0.05
    done
    kill -9 "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    daemon=''
    rm -f "$work/disk"
}

# measure WORKLOAD TARGET UNIT FIO-OPTION...: appends "WORKLOAD|TARGET|value" to results. UNIT: iops or MiB/s.
measure() {
    local workload=$1 target=$2 unit=$3 direct=1
    shift 3
    # The plain file through the page cache: so do the daemons read their images. O_DIRECT keeps the mount's own cache out.
    [[ $target == plain ]] && direct=0
    fio --name=job --filename="$disk" --direct=$direct --ioengine=libaio --size="${size_mib}M" --output-format=json --eta=never \
        --randrepeat=1 --allow_file_create=0 --invalidate=0 "$@" >fio.json 2>fio.err || { cat fio.err fio.json >&2 && die "fio failed: $workload on $target"; }
    python3 - "$workload" "$target" "$unit" >>results <<'END'
import json, sys
workload, target, unit = sys.argv[1:]
job = json.load(open("fio.json"))["jobs"][0]
side = max(job["read"], job["write"], key=lambda one: one["io_bytes"])
value = side["iops"] if unit == "iops" else side["bw_bytes"] / (1 << 20)
print("%s (%s)|%s|%.1f" % (workload, unit, target, value))
END
}

timed=(--time_based "--runtime=$seconds")

steady() {
    local target=$1
    measure '4 KiB random read, depth 1' "$target" iops --rw=randread --bs=4k --iodepth=1 "${timed[@]}"
    measure '4 KiB random read, depth 32' "$target" iops --rw=randread --bs=4k --iodepth=32 "${timed[@]}"
    measure '1 MiB sequential read, depth 4' "$target" MiB/s --rw=read --bs=1M --iodepth=4 "${timed[@]}"
    measure '4 KiB random write, depth 1' "$target" iops --rw=randwrite --bs=4k --iodepth=1 "${timed[@]}"
    measure '4 KiB random write, depth 32' "$target" iops --rw=randwrite --bs=4k --iodepth=32 "${timed[@]}"
    measure '1 MiB sequential write, depth 4' "$target" MiB/s --rw=write --bs=1M --iodepth=4 "${timed[@]}"
}

first_touch() {
    local target=$1
    measure 'first touch, 1 MiB sequential' "$target" MiB/s --rw=read --bs=1M --iodepth=1
}

# 4 KiB of every cluster of 64 KiB, in order: each read is a miss.
sparse_touch() {
    local target=$1
    measure 'first touch, 4 KiB of each cluster' "$target" iops --rw=read:60k --bs=4k --iodepth=1 --io_size="$((size_mib / 16))M"
}

fresh_overlay() {
    rm -f overlay.qcow2
    qemu-img create -q -f qcow2 -F raw -b base.raw overlay.qcow2
}

printf 'disk of %s MiB, %s rounds, in %s (%s)\n' "$size_mib" "$rounds" "$work" "$(stat -fc %T .)"
# Random bytes: nothing in the way may profit from zeros.
head -c "${size_mib}M" /dev/urandom >base.raw
cp base.raw plain.raw
for target in "${targets[@]}"; do
    [[ $target == plain ]] || qemu-img convert -f raw -O qcow2 base.raw "$target.qcow2"
done

checked=''
: >results
for ((round = 1; round <= rounds; round++)); do
    for target in "${targets[@]}"; do
        printf '%sround %d of %d: %-8s%s\r' "$dim" "$round" "$rounds" "$target" "$plain" >&2
        image=$target.qcow2
        [[ $target == plain ]] && image=plain.raw
        put_up "$target" "$image" warm
        cat "$image" >/dev/null # into the page cache
        steady "$target"
        take_down
        for touch in first_touch sparse_touch; do
            [[ $target == plain ]] || fresh_overlay
            put_up "$target" "$([[ $target == plain ]] && echo plain.raw || echo overlay.qcow2)" cold
            $touch "$target"
            if [[ $target == cordisk && $touch == first_touch && -z $checked ]]; then
                cmp base.raw "$disk" || die "the disk does not hold what its base holds"
                checked=1
            fi
            take_down
        done
    done
done
printf '\n' >&2
[[ -n $checked ]] && echo 'content checked once: after a first touch the disk equals its base'

python3 - "${targets[@]}" <<'END'
import statistics, sys
targets = sys.argv[1:]
values = {}
for line in open("results"):
    workload, target, value = line.rstrip("\n").split("|")
    values.setdefault(workload, {}).setdefault(target, []).append(float(value))
ratios = [(one, other) for one, other in (("cordisk", "plain"), ("cordisk", "qsd")) if one in targets and other in targets]
print("%-46s" % "median of the rounds" + "".join("%12s" % target for target in targets) + "".join("%16s" % ("%s/%s" % ratio) for ratio in ratios))
for workload, row in values.items():
    median = {target: statistics.median(row[target]) for target in row}
    cells = "".join("%12s" % format(median[target], ",.0f") for target in targets)
    cells += "".join("%16.2f" % (median[one] / median[other]) for one, other in ratios)
    print("%-46s" % workload + cells)
END
