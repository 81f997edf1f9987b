#!/usr/bin/env bash
# Fuzzes every target (or one) for a while each, and prints what came of it.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/fuzz.sh [TARGET] [SECONDS]

Builds the fuzz targets in tests/fuzz, runs all of them (or TARGET) one after the other for SECONDS each (60), and
prints a table. What a run finds is kept in tests/fuzz/artifacts; the exit status is 1 then.
Needs cargo-fuzz (cargo install cargo-fuzz). Uses nightly Rust where rustup has it, and otherwise the installed
compiler with RUSTC_BOOTSTRAP=1, which makes a stable one accept what the fuzzer's instrumentation needs.

  -l, --list     the targets
  -h, --help     this text

Environment:
  CORDISK_SANITIZER=address  another sanitizer than none (the crate has no unsafe code)
  RUSTC_BOOTSTRAP=1          the installed compiler, although there is a nightly one
END
}

fuzz=$repo/tests/fuzz
list() { sed -n '/^\[\[bin\]\]/,/^$/s/^name = "\(.*\)"/\1/p' "$fuzz/Cargo.toml"; }

target='' seconds=60
for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit 0 ;;
        -l | --list) list && exit 0 ;;
        *[!0-9]*) target=$argument ;;
        ?*) seconds=$argument ;;
        *) usage >&2 && exit 2 ;;
    esac
done
mapfile -t targets < <(list)
if [[ -n $target ]]; then
    [[ " ${targets[*]} " == *" $target "* ]] || die "no target \"$target\"; there are: ${targets[*]}"
    targets=("$target")
fi
cd "$repo"
cargo fuzz --version >/dev/null 2>&1 || die 'cargo-fuzz is needed: cargo install cargo-fuzz'
cargo=(cargo)
if [[ ${RUSTC_BOOTSTRAP:-} != 1 ]] && cargo +nightly --version >/dev/null 2>&1; then
    cargo=(cargo +nightly)
else
    export RUSTC_BOOTSTRAP=1
    printf 'RUSTC_BOOTSTRAP=1 with %s\n' "$(rustc --version)"
fi
sanitizer=(-s "${CORDISK_SANITIZER:-none}")
"${cargo[@]}" fuzz build --fuzz-dir "$fuzz" "${sanitizer[@]}" ${target:+"$target"}

work=$(mktemp -d "${TMPDIR:-/tmp}/cordisk-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work
rows=() status=0
for target in "${targets[@]}"; do
    printf '\n%s== %s%s\n' "$bold" "$target" "$plain"
    mkdir -p "$work/$target" "$fuzz/artifacts/$target"
    begun=$SECONDS found=0
    # What is new goes to a directory of its own, the committed inputs stay as they are. QMP's are
    # longest, and a file system takes some KiB. Each case is short: ten seconds are a hang. Memory:
    # what the engine holds is bounded by the file, and files here are small.
    case $target in qmp_codec | boot_set) longest=4096 ;; *) longest=1500 ;; esac
    "${cargo[@]}" fuzz run --fuzz-dir "$fuzz" "${sanitizer[@]}" "$target" "$work/$target" "$fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=$longest -len_control=0 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 -print_final_stats=1 \
        >"$work/$target.log" 2>&1 || found=1 status=1
    executions=$(awk '/stat::number_of_executed_units/ { print $2 }' "$work/$target.log" | tail -1)
    ((found)) && tail -40 "$work/$target.log"
    rows+=("$(printf '%-12s %12s %9d  %s' "$target" "${executions:-?}" $((SECONDS - begun)) \
        "$( ((found)) && echo "FOUND, see tests/fuzz/artifacts/$target" || echo none)")")
done
printf '\n%-12s %12s %9s  %s\n' target executions seconds findings
printf '%s\n' "${rows[@]}"
exit $status
