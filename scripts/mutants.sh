#!/usr/bin/env bash
# Takes the steps that keep data safe out of the engine, one at a time, and runs the suite: a step that no test misses is a failure.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/mutants.sh [--list] [STEP...]

For every step of src/mutants.rs (or the ones that are named): runs the engine's tests without that step. Some test must fail; its
name is printed. Ends with 1 if a step was missed by nobody.

  --list      names the steps and what they are for
  -h, --help  this text

The suite runs once with all steps first, and must pass. A test that stands still for 90 seconds is ended, and has noticed.

Environment:
  CORDISK_SEED=N          seed of the random tests
  CORDISK_CRASH_STATES=N  how many states after a loss of power are looked at (default here: 2000; more takes longer)
END
}

list_only=''
chosen=()
for argument in "$@"; do
    case $argument in
        --list) list_only=1 ;;
        -h | --help) usage && exit 0 ;;
        -*) usage >&2 && exit 2 ;;
        *) chosen+=("$argument") ;;
    esac
done
cd "$repo"
have cargo || die "cargo is not in PATH; see https://rustup.rs"

# Rooms that know nothing of the disk cannot notice; leaving them out saves most of the time.
readonly long='simulation'
readonly rooms='(image|disk|stream|storage|range_lock|fuse|chain|simulation)::'
export CORDISK_CRASH_STATES=${CORDISK_CRASH_STATES:-2000}
export CORDISK_SEED=${CORDISK_SEED:-$((RANDOM * 32768 + RANDOM))}
unset CORDISK_MUTANT

cargo test --locked --quiet --lib --no-run
binary=$(cargo test --locked --lib --no-run --message-format json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\)".*"name":"cordisk".*/\1/p; s/.*"name":"cordisk".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[[ -x $binary ]] || die "the test program was not found"

mapfile -t known < <("$binary" --exact mutants::list --nocapture | sed -n 's/^.*mutant \([a-z0-9-]*\)\t\(.*\)$/\1\t\2/p')
((${#known[@]})) || die "the test program knows no steps"
if [[ -n $list_only ]]; then
    printf '%s\n' "${known[@]}" | column -t -s $'\t'
    exit 0
fi

# run STEP LOG: the suite without this step, up to the first failure.
run() {
    local step=$1 log=$2
    # Short tests first would be better still, but nextest has no order of its own; what is known to be long is left to the second part.
    local part
    for part in "test(/^$rooms/) - test(/^$long::/)" "test(/^$long::/)"; do
        ${step:+env CORDISK_MUTANT="$step"} cargo nextest run --locked --lib --profile mutants --fail-fast --no-tests=fail \
            --status-level fail --final-status-level none -E "$part" >"$log" 2>&1 || return
    done
}

have cargo-nextest || die "cargo-nextest is not in PATH; cargo install --locked cargo-nextest"
printf 'seed: CORDISK_SEED=%s\n' "$CORDISK_SEED"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run '' "$log" || { cat "$log" >&2 && die "the suite fails with all steps in place"; }
printf 'with all steps in place every test passes\n'
noticed=0 missed=()
for line in "${known[@]}"; do
    step=${line%%$'\t'*}
    if ((${#chosen[@]})) && [[ " ${chosen[*]} " != *" $step "* ]]; then continue; fi
    status=0
    begin=$SECONDS
    run "$step" "$log" || status=$?
    case $status in
        0) missed+=("$step") && by="${red}nobody$plain" ;;
        *)
            by=$(sed 's/\x1b\[[0-9;]*m//g' "$log" |
                sed -n 's/^ *\(FAIL\|SIGABRT\|TIMEOUT\) \[[^]]*\] *\(([^)]*) *\)\{0,1\}cordisk */\1 /p' | head -n 1)
            by=${by/#TIMEOUT /stands still: } by=${by#* }
            [[ $by == still:* ]] && by="${by#still: } (it stands still)"
            ;;
    esac
    if ((status)) && [[ -z $by ]]; then
        cat "$log" >&2
        die "the suite did not run without $step"
    fi
    ((status == 0)) || noticed=$((noticed + 1))
    printf '%-32s noticed by %s %s(%ss)%s\n' "$step" "$by" "$dim" $((SECONDS - begin)) "$plain"
done
printf 'mutants: %s noticed, %s missed%s\n' "$noticed" "${#missed[@]}" "${missed:+: ${missed[*]}}"
((${#missed[@]} == 0))
