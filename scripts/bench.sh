#!/usr/bin/env bash
# The benchmark: cordisk beside every peer and beside the ceiling of its transport. A table, JSON
# and a chart. Builds; scripts/bench.py measures, or, with --remote first, scripts/bench_remote.py,
# or, with `--only order` first, scripts/bench_order.py.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C
install_missing python3 || die 'cannot go on without'
bench=$repo/scripts/bench.py
if [[ ${1:-} == --remote ]]; then
    shift
    bench=$repo/scripts/bench_remote.py
elif [[ ${1:-} == --only && ${2:-} == order ]]; then
    shift 2
    bench=$repo/scripts/bench_order.py
fi
# --help ends here, and so does whatever was typed wrong: before anything is installed or built.
for word in "$@"; do
    case $word in -h | --help) exec python3 "$bench" --help ;; esac
done
python3 "$bench" "$@" --parse-only
if [[ $bench == *order.py ]]; then
    install_missing fio qemu-img qemu-storage-daemon qemu-system-x86_64 fusermount3 nbdkit nginx || die 'cannot go on without'
    install_missing nbdfuse || echo 'going on without; its start is left out' >&2
    # Another guest is the user's.
    [[ " $* " == *' --guest'[=\ ]* ]] || "$repo/scripts/order_guest.sh"
    cd "$repo"
    cargo build --release --locked --quiet --package cordisk
    cd - >/dev/null
    exec python3 "$bench" --cordisk "${CARGO_TARGET_DIR:-$repo/target}/release/cordisk" "$@"
fi
if [[ $bench == *remote.py ]]; then
    install_missing fio qemu-img qemu-storage-daemon fusermount3 nbdkit nginx || die 'cannot go on without'
    cd "$repo"
    cargo build --release --locked --quiet --package cordisk
    cd - >/dev/null
    exec python3 "$bench" --cordisk "${CARGO_TARGET_DIR:-$repo/target}/release/cordisk" "$@"
fi

install_missing fio qemu-img fusermount3 || die 'cannot go on without'
install_missing qemu-storage-daemon nbdkit nbdfuse || echo 'going on without; its column is left out' >&2

cd "$repo"
cargo build --release --locked --quiet --package cordisk
# The ceiling. It needs the crates of the tests beside it, so the first build takes a while.
cargo build --release --locked --quiet --example passthrough
cd - >/dev/null
release=${CARGO_TARGET_DIR:-$repo/target}/release
# Given twice, the last one counts: a --cordisk of the user comes later.
exec python3 "$bench" --cordisk "$release/cordisk" --passthrough "$release/examples/passthrough" "$@"
