#!/usr/bin/env bash
# Sets up and runs every test. What cannot run here is named in the last lines, never passed over.
#
#   tests/run.sh              everything
#   tests/run.sh quick        fmt, clippy, unit, simulation and end-to-end tests with stand-ins
#
# WHARF_SIM_SEEDS=n sets how many random days are simulated (200; in release builds 10000).
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-all}
work=$PWD/.cache/test
mkdir -p "$work"
rm -f "$work"/*.log
export WHARF_SKIP_FILE=$work/skipped
: >"$WHARF_SKIP_FILE"
passed=0 failed=0
failures=()
began=$SECONDS

step() { # step NAME COMMAND...: one line per step; the whole output only when it fails
    local name=$1 log=$work/$1.log start=$SECONDS
    shift
    printf '%-14s' "$name"
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1))
        printf 'ok      %4d s  %s\n' $((SECONDS - start)) "$(summary "$log")"
    else
        failed=$((failed + 1))
        failures+=("$name")
        printf 'FAILED  %4d s\n' $((SECONDS - start))
        tail -n 80 "$log" | sed 's/^/    /'
    fi
}

summary() { # of cargo's closing lines, and what the small worlds say
    awk '/^test result:/ { p += $4; f += $6; i += $8 } /^small worlds:/ { if ($3 > s) s = $3 }
        END { if (p + f) printf "%d tests", p + f; if (i) printf ", %d ignored", i; if (s) printf ", %d states", s }' "$1"
}

# What failed, short: the last lines of a run are what people and CI keep.
gist() { # gist NAME
    local found
    found=$(grep -A 6 -m 3 -E 'panicked at|^error|FAIL|Error' "$work/$1.log" | cut -c 1-300 | head -n 14)
    echo "--- $1 (.cache/test/$1.log)"
    if [ -n "$found" ]; then echo "$found"; else tail -n 10 "$work/$1.log"; fi
}

skip() { echo "$1" >>"$WHARF_SKIP_FILE"; printf '%-14sSKIPPED  %s\n' "$2" "$1"; }

command -v cargo >/dev/null || { echo "missing: cargo (install Rust from https://rustup.rs)" >&2; exit 1; }

step fmt cargo fmt --check
step clippy cargo clippy --all-targets --locked -- -D warnings
step build cargo build --tests --locked

if [ "$mode" = all ]; then
    if server=$(tests/support/setup.sh llama ada bob 2>"$work/setup-llama.log"); then
        export WHARF_TEST_LLAMA=$server WHARF_TEST_GGUF=$PWD/.cache/gguf
    else
        cat "$work/setup-llama.log"
    fi
    if python=$(tests/support/setup.sh python 2>"$work/setup-python.log"); then
        export WHARF_TEST_PYTHON=$python
    else
        cat "$work/setup-python.log"
    fi
    # A daemon of our own when none runs; stopped again at the end.
    . tests/support/docker_env.sh
fi

step unit cargo test --locked --lib
step simulation cargo test --locked --test sim -- --nocapture
for file in tests/*.rs tests/*/main.rs; do
    name=$(basename "${file%/main.rs}" .rs)
    [ "$name" != sim ] || continue
    step "$name" cargo test --locked --test "$name" -- --nocapture
done

if [ "$mode" = all ]; then
    for script in tests/stack/*.sh; do
        [ -e "$script" ] || continue
        name=$(basename "$script" .sh)
        step "$name" bash "$script"
    done
fi

echo
skipped=$(sort -u "$WHARF_SKIP_FILE" | wc -l)
if [ "$skipped" -gt 0 ]; then
    echo "SKIPPED (these could not run here):"
    sort -u "$WHARF_SKIP_FILE" | sed 's/^/  - /'
else
    echo "skipped: nothing"
fi
for name in "${failures[@]}"; do gist "$name"; done
[ ${#failures[@]} -eq 0 ] || echo "failed: ${failures[*]}"
echo "time: $((SECONDS - began)) s"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
