#!/usr/bin/env bash
# Takes the steps that keep data safe out of the engine, one at a time, and runs the suite: a step
# that no test misses is a failure.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'END'
usage: scripts/mutants.sh [--list] [STEP...]

For every step of src/host/mutants.rs (or the ones that are named): runs the engine's tests without that step. Some test must fail; its
name is printed. Ends with 1 if no test failed without a step, or if it is not known whether one would.

  --list      names the steps and what they are for
  -h, --help  this text

The suite runs once with all steps first, and must pass. A test that stands still for 90 seconds is ended. That is no failure of the
test: the machine may be slow, or the step may be what keeps threads from waiting for each other. The suite goes on to the next
failure; where there is none, the step is listed as "unknown".

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

# Crates that know nothing of the disk cannot notice; leaving them out saves most of the time.
readonly long='package(cordisk-trials)'
readonly short='package(cordisk-host) + package(cordisk-qcow2) + package(cordisk-engine) + package(cordisk-export)'
export CORDISK_CRASH_STATES=${CORDISK_CRASH_STATES:-2000}
export CORDISK_SEED=${CORDISK_SEED:-$((RANDOM * 32768 + RANDOM))}
unset CORDISK_MUTANT

mapfile -t known < <(cargo test --locked --quiet --package cordisk-host --lib -- --exact mutants::list --nocapture |
    sed -n 's/^.*mutant \([a-z0-9-]*\)\t\(.*\)$/\1\t\2/p')
((${#known[@]})) || die "the test program knows no steps"
if [[ -n $list_only ]]; then
    printf '%s\n' "${known[@]}" | column -t -s $'\t'
    exit 0
fi

# verdicts WORD LOG: the tests that nextest gave this verdict, one a line. Statuses are FAIL,
# TIMEOUT, SIGABRT and other signals.
verdicts() {
    sed 's/\x1b\[[0-9;]*m//g' "$2" | sed -n "s/^ *\($1\) \[[^]]*\] *\(([^)]*) *\)\{0,1\}cordisk[a-z-]*  *//p"
}

# run STEP LOG: the suite without this step, up to the first failure. A test that was ended for its
# time is left out of the next round.
run() {
    local step=$1 log=$2
    # Short tests first would be better still, but nextest has no order of its own; what is known to
    # be long is left to the second part.
    local part slow status=0
    : >"$log"
    for part in "$short" "$long"; do
        while :; do
            ${step:+env CORDISK_MUTANT="$step"} cargo nextest run --locked --workspace --lib --profile mutants --fail-fast --no-tests=pass \
                --status-level fail --final-status-level none -E "$part" >"$log.part" 2>&1 && status=0 || status=$?
            cat "$log.part" >>"$log"
            ((status)) || break
            [[ -z $(verdicts 'FAIL\|SIG[A-Z0-9]*' "$log.part") ]] || return "$status"
            slow=$(verdicts TIMEOUT "$log.part" | sort -u)
            [[ -n $slow ]] || return "$status"
            while read -r test; do part="($part) - test(=$test)"; done <<<"$slow"
        done
    done
    [[ -z $(verdicts TIMEOUT "$log") ]]
}

have cargo-nextest || die "cargo-nextest is not in PATH; cargo install --locked cargo-nextest"
printf 'seed: CORDISK_SEED=%s\n' "$CORDISK_SEED"
log=$(mktemp)
trap 'rm -f "$log" "$log.part"' EXIT
run '' "$log" || { cat "$log" >&2 && die "the suite fails with all steps in place"; }
printf 'with all steps in place every test passes\n'
noticed=0 missed=() unknown=()
for line in "${known[@]}"; do
    step=${line%%$'\t'*}
    if ((${#chosen[@]})) && [[ " ${chosen[*]} " != *" $step "* ]]; then continue; fi
    status=0
    begin=$SECONDS
    run "$step" "$log" || status=$?
    failed=$(verdicts 'FAIL\|SIG[A-Z0-9]*' "$log" | head -n 1)
    slow=$(verdicts TIMEOUT "$log" | head -n 1)
    if [[ -n $failed ]]; then
        noticed=$((noticed + 1)) result="noticed by $failed"
    elif [[ -n $slow ]]; then
        unknown+=("$step") result="${red}unknown: $slow was ended for its time$plain"
    elif ((status == 0)); then
        missed+=("$step") result="${red}noticed by no test$plain"
    else
        cat "$log" >&2
        die "the suite did not run without $step"
    fi
    printf '%-32s %s %s(%ss)%s\n' "$step" "$result" "$dim" $((SECONDS - begin)) "$plain"
done
printf 'mutants: %s noticed, %s missed%s, %s unknown%s\n' "$noticed" "${#missed[@]}" "${missed:+: ${missed[*]}}" \
    "${#unknown[@]}" "${unknown:+: ${unknown[*]}}"
((${#missed[@]} + ${#unknown[@]} == 0))
