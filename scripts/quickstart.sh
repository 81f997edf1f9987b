#!/usr/bin/env bash
# The main job, once, before your eyes: overlay, mount, copy-on-read, stream, independence.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/quickstart.sh [--speed RATE] [BASE_IMAGE]

Builds cordisk and shows what it does: puts an empty overlay on top of a base image, mounts it as a
raw file, reads through it, streams the rest in the background, and proves that the overlay then
stands alone. Without BASE_IMAGE it makes an ext4 image from files of this machine, and does the same
once more with that image on a web server, if nginx is installed.

BASE_IMAGE is only ever read. It is taken as qcow2 if its name ends in .qcow2 or its first bytes say
so, as raw otherwise.

  --speed RATE  bytes per second of the stream, with K, M or G (default: 32M, or what takes about 10 s)
  -h, --help    this text
END
}

speed='' base_image=''
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --speed)
            (($# > 1)) || { usage >&2 && exit 2; }
            speed=$2 && shift 2
            ;;
        --speed=*) speed=${1#*=} && shift ;;
        -*) usage >&2 && exit 2 ;;
        *) [[ -z $base_image ]] || { usage >&2 && exit 2; }
            base_image=$1 && shift ;;
    esac
done
[[ -z $speed || $speed =~ ^[1-9][0-9]*[KMG]?$ ]] || die "--speed $speed: want a number, perhaps with K, M or G"

# ---- how it talks --------------------------------------------------------------------------------

steps=0
step() {
    steps=$((steps + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$steps" "$1" "$plain"
}
say() { printf '   %s\n' "$*"; }
show_command() { printf '   %s$ %s%s\n' "$dim" "$*" "$plain"; }
# run COMMAND...: shows it, runs it, indents what it says, in 80 columns.
run() {
    show_command "$*"
    "$@" 2>&1 | awk '{
        indent = "     "
        while (length(indent $0) > 80) {
            at = 81 - length(indent)
            while (at > 30 && substr($0, at, 1) != " ") at--
            if (at == 30) break # a long name stays whole
            print indent substr($0, 1, at - 1)
            $0 = substr($0, at + 1)
            indent = "                "
        }
        print indent $0
    }'
}

# build COMMAND...: shows how far cargo is: on a terminal with cargo's own bar, otherwise with a
# line for every 20 crates. What is no progress (a warning, an error) is shown in full.
build() {
    show_command "$*"
    if [[ -t 1 && -t 2 ]]; then
        "$@"
        return
    fi
    CARGO_TERM_COLOR=never "$@" 2>&1 | awk '
        /^ *(Compiling|Checking) / { if (++crates % 20 == 0) { print "     " crates " crates compiled"; fflush() } next }
        /^ *(Downloaded|Locking|Updating|Adding|Blocking) / { next }
        { sub(/^ +/, ""); print "     " $0; fflush() }'
}

# ---- before the start ----------------------------------------------------------------------------

have cargo || die "cargo is not in PATH; see https://rustup.rs"
tools=(cc qemu-img python3 fusermount3 umount)
[[ -n $base_image ]] || tools+=(mkfs.ext4 debugfs)
install_missing "${tools[@]}" || die "cannot go on without"
[[ -e /dev/fuse ]] || modprobe fuse 2>/dev/null || true
[[ -e /dev/fuse ]] || die "there is no /dev/fuse: load the kernel module fuse, or give the container the device"
[[ -r /dev/fuse && -w /dev/fuse ]] || die "no permission to use /dev/fuse: run as root, or let this user in"
if [[ -n $base_image ]]; then
    [[ -f $base_image ]] || die "$base_image: no such regular file"
    [[ -r $base_image ]] || die "$base_image: not readable"
    base_image=$(realpath "$base_image")
fi

step 'Build the release binary'
say 'a few minutes the first time, nothing to do after that'
(cd "$repo" && build cargo build --release --locked --package cordisk)
PATH=${CARGO_TARGET_DIR:-$repo/target}/release:$PATH

work=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/cordisk-quickstart.XXXXXX")")
cd "$work"

finish() {
    local status=$?
    trap - EXIT
    trap '' INT TERM # cleaning up takes a moment and is not to be cut short
    cd /
    # The file system inside the disk first, then the disk, then the directory; only what this
    # script made.
    unmount "$work/files" 2>/dev/null || true
    unmount "$work/disk" 2>/dev/null || true
    if mountpoint_is_busy "$work/disk"; then
        if ((EUID == 0)); then umount -l "$work/disk"; else fusermount3 -uz "$work/disk"; fi || true
    fi
    if [[ -s $work/pid ]]; then wait_for_end "$(cat "$work/pid")" || kill "$(cat "$work/pid")" 2>/dev/null || true; fi
    stop_server
    rm -rf --one-file-system "$work"
    if ((status)); then
        printf '\n%sThe quickstart did not finish (status %d).%s\n' "$red" "$status" "$plain" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start_server DIRECTORY: nginx with the files of a directory, on a free port of 127.0.0.1. Sets
# `url`.
server=''
start_server() {
    local port tries
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    mkdir web
    cat >web/nginx.conf <<END
daemon off;
pid $work/web/pid;
error_log $work/web/error.log;
$( ((EUID)) || echo 'user root;')
events {}
http {
    access_log $work/web/access.log;
    client_body_temp_path $work/web/body;
    proxy_temp_path $work/web/proxy;
    fastcgi_temp_path $work/web/fastcgi;
    uwsgi_temp_path $work/web/uwsgi;
    scgi_temp_path $work/web/scgi;
    server { listen 127.0.0.1:$port; root "$1"; }
}
END
    nginx -p "$work/web" -c "$work/web/nginx.conf" -e "$work/web/error.log" >web/output 2>&1 &
    server=$!
    url=http://127.0.0.1:$port
    for ((tries = 0; tries < 100; tries++)); do
        [[ ! -s web/pid ]] || return 0
        sleep 0.1
    done
    cat web/output >&2
    die 'nginx did not start'
}

stop_server() {
    [[ -n $server ]] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=''
}

# wait_for_end PID: until our daemon is gone, at most 10 s.
wait_for_end() {
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        [[ $(readlink "/proc/$1/exe" 2>/dev/null) == */cordisk* ]] || return 0
        sleep 0.1
    done
    return 1
}

# ---- the base ------------------------------------------------------------------------------------

# A directory with an image inside, so that "the base is away" can be shown by renaming the
# directory. For BASE_IMAGE it is a symbolic link to its directory: names of backing files that it
# carries itself still resolve, and nothing of the user's is touched.
if [[ -z $base_image ]]; then
    step 'Make a base image: an ext4 file system with files of this machine'
    mkdir tree base
    # Up to 96 MiB of files below /usr/share; the image has 256 MiB, so some of it stays empty.
    { find /usr/share -xdev -type f -readable -size -8M -printf '%s %P\n' 2>/dev/null || true; } | LC_ALL=C sort -k2 |
        awk 'sum + $1 <= 96 * 1048576 { sum += $1; print substr($0, index($0, " ") + 1) }' >list
    tar -C /usr/share --no-recursion --files-from=list -cf - 2>/dev/null | tar -C tree -xf -
    run mkfs.ext4 -q -L quickstart -d tree base/base.raw 256M
    name=base.raw format=raw
    say "base.raw: $(wc -l <list) files, $(human "$(on_disk base/base.raw)") on disk"
    speed=${speed:-32M}
else
    step "Take $base_image as the base"
    ln -s "$(dirname "$base_image")" base
    name=$(basename "$base_image")
    if [[ $name == *.qcow2 ]] || [[ $(head -c 4 "$base_image" | od -An -tx1 | tr -d ' \n') == 514649fb ]]; then
        format=qcow2
    else
        format=raw
    fi
    say "format: $format (qcow2 if the name ends in .qcow2 or the file starts with QFI\\xfb, raw otherwise)"
    before=$(stat -Lc '%s %Y %Z' "$base_image")
fi
base=base/$name
size=$(qemu-img info -U -f "$format" --output=json "$base" | python3 -c 'import json, sys; print(json.load(sys.stdin)["virtual-size"])')
free=$(($(stat -fc '%a * %S' .)))
((free > size)) || die "the stream may need $(human "$size"), but $work has $(human "$free"); set TMPDIR to a place with more"
if [[ -z $speed ]]; then
    speed=$(awk -v size="$size" 'BEGIN { rate = int(size / 10 / 1048576) + 1; print (rate < 8 ? 8 : rate) "M" }')
fi
speed_bytes=$(numfmt --from=iec "$speed")

# stands_alone: whether the running disk has nothing below it any more.
stands_alone() {
    cordisk status --json disk | python3 -c 'import json, sys; sys.exit(bool(json.load(sys.stdin)[0]["chain"]))'
}

# ---- the disk ------------------------------------------------------------------------------------

step 'Create an empty overlay on top of it'
run cordisk create overlay.qcow2 -b "$base" -F "$format"
empty=$(on_disk overlay.qcow2)
say "overlay.qcow2 occupies $(human "$empty")"

step 'Mount it: the whole disk is there at once, as a raw file'
show_command cordisk mount --pidfile pid overlay.qcow2 disk
cordisk mount --pidfile pid overlay.qcow2 disk # not through run: a pipe would wait for the daemon as well
run ls -l disk

step 'Read through it: what is read is copied up into the overlay'
if [[ -z $base_image ]]; then
    # What cp would read: a few files from the middle of the list.
    mapfile -t some < <(awk -v n="$(wc -l <list)" 'NR % (int(n / 40) + 1) == 1' list)
    mkdir files
    # The real reader: the kernel's ext4 on a loop device. Without root, e2fsprogs read the same
    # bytes.
    if ((EUID == 0)) && { show_command mount -o ro,loop disk files && mount -o ro,loop disk files 2>/dev/null; }; then
        show_command "cmp tree/FILE files/FILE   # ${#some[@]} files"
        for file in "${some[@]}"; do cmp -- "tree/$file" "files/$file"; done
        run umount files
    else
        ((EUID == 0)) && say '(no loop device here; debugfs reads the file system instead)'
        show_command "debugfs -R 'cat /FILE' disk"
        for file in "${some[@]}"; do debugfs -R "cat \"/$file\"" disk 2>/dev/null | cmp - "tree/$file"; done
    fi
    say "${#some[@]} files read through the disk, each equal to the original"
else
    first=$((size / 4 < 32 << 20 ? size / 4 : 32 << 20))
    run dd if=disk of=/dev/null bs=1M count=$(((first + (1 << 20) - 1) >> 20)) status=none
    say "the first $(human "$first") read through the disk"
fi
grown=$(on_disk overlay.qcow2)
say "overlay.qcow2 occupies $(human "$grown") now: $(human $((grown - empty))) came with these reads"

step "Fill the rest in the background, at $(human "$speed_bytes")/s; the disk stays usable"
run cordisk stream disk --speed "$speed"
sleep 1 # so that there is something to see
run cordisk status disk
show_command cordisk stream disk --wait
# Joins the stream; on a terminal this is a bar. One that was so fast that it has ended leaves
# nothing to join, and is started again as one with nothing to do.
cordisk stream disk --wait
stands_alone || die 'the stream is complete, and the disk still has a backing file'
say "overlay.qcow2 occupies $(human "$(on_disk overlay.qcow2)") now"

# ---- the proof -----------------------------------------------------------------------------------

# same_as_base IMAGE FORMAT BASE: byte for byte, as QEMU reads both.
same_as_base() {
    run qemu-img compare -U -f "$format" -F "$2" "$3" "$1"
}

step 'The disk holds what the base holds'
same_as_base disk raw "$base"

step 'Unmount; the overlay needs its base no longer'
pid=$(cat pid)
run cordisk umount disk
[[ $(readlink "/proc/$pid/exe" 2>/dev/null) != */cordisk* ]] || die 'cordisk umount came back before its daemon had ended'
show_command 'qemu-img info overlay.qcow2 | head -5'
qemu-img info overlay.qcow2 | sed -n '1,5s/^/     /p'
qemu-img info --output=json overlay.qcow2 | python3 -c 'import json, sys; sys.exit("backing-filename" in json.load(sys.stdin))' ||
    die 'overlay.qcow2 still names a backing file'
say 'no "backing file" in there'
run qemu-img check overlay.qcow2
run mv base base-away
same_as_base overlay.qcow2 qcow2 "base-away/$name"
say 'with the base out of its reach, the overlay still reads the same'
run mv base-away base
if [[ -n $base_image ]]; then
    [[ $(stat -Lc '%s %Y %Z' "$base_image") == "$before" ]] || die "$base_image changed meanwhile (not by this script)"
    say "$base_image is as it was"
fi

# ---- a base on a server --------------------------------------------------------------------------

if [[ -z $base_image ]] && have nginx; then
    start_server "$work/base"
    far=(--cache cache)
    step "The same base, on a web server: $url"
    say 'its size and ETag are stored in the overlay: another file is never read in its place'
    run cordisk create "${far[@]}" far.qcow2 -b "$url/$name" -F "$format"
    show_command cordisk mount "${far[@]}" --backing-url "$url/" --pidfile pid far.qcow2 disk
    cordisk mount "${far[@]}" --backing-url "$url/" --pidfile pid far.qcow2 disk
    run dd if=disk of=/dev/null bs=1M count=32 status=none
    run cordisk status disk
    say 'what was read is in a cache, which all disks share'
    run cordisk cache list "${far[@]}"
    run cordisk stream disk --wait
    stands_alone || die 'the stream is complete, and the disk still has a backing file'
    run cordisk umount disk
    step 'The web server ends; the overlay stands alone'
    stop_server
    same_as_base far.qcow2 qcow2 "$base"
elif [[ -z $base_image ]]; then
    printf '\n%s(nginx is not installed: the part with the base on a web server is left out)%s\n' "$dim" "$plain"
fi

printf '\n%sDone.%s The working directory %s is removed again.\n' "$green" "$plain" "$work"
