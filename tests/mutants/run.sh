#!/usr/bin/env bash
# Would a test notice? Plants one fault at a time into a copy of the scheduler and runs its tests.
#
#   tests/mutants/run.sh              every fault of tests/mutants/faults
#   tests/mutants/run.sh NAME...      these
#
# The copy is a crate of its own (target/mutants/tree): the scheduler, the catalog, their tests, the
# small world and the simulator. It compiles in seconds where the whole takes minutes, because the
# scheduler imports nothing else; should it ever need more, `files` below says where to add it.
# A fault is caught by the first suite in which a test fails. Exit 1: one survived, or one does not
# apply any more (`cargo test --test mutants` says which, and why).
#
# WHARF_SIM_SEEDS (20), WHARF_SMALL_WORLD_DEPTH (6), WHARF_DAYS (60): how long each suite looks.
# WHARF_MUTANTS (target/mutants): where; two runs at a time need two places.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD faults=$PWD/tests/mutants/faults place=$PWD/${WHARF_MUTANTS:-target/mutants}
tree=$place/tree whole=$place/whole
export CARGO_TARGET_DIR=$place/build CARGO_TERM_COLOR=never RUST_BACKTRACE=0
export WHARF_SIM_SEEDS=${WHARF_SIM_SEEDS:-20} WHARF_DAYS=${WHARF_DAYS:-60}
export WHARF_SMALL_WORLD_DEPTH=${WHARF_SMALL_WORLD_DEPTH:-6}
# A fault may make a test run for ever.
limit=${WHARF_MUTANT_TIMEOUT:-600}

files=(src/units.rs src/config/catalog.rs src/config/catalog src/config/defaults.rs
    src/config/shape.rs src/scheduler tests/sim tests/small_world)

lay_out() {
    rm -rf "$tree" "$whole"
    for file in "${files[@]}"; do
        mkdir -p "$tree/$(dirname "$file")"
        cp -r "$file" "$tree/$file"
    done
    cp Cargo.lock "$tree/"
    cat >"$tree/src/lib.rs" <<'LIB'
pub mod units;
pub mod config {
    pub mod catalog;
    mod defaults;
    pub mod shape;
}
pub mod store {
    pub const MEMORY: &str = ":memory:";
}
pub mod scheduler;
LIB
    {
        printf '[package]\nname = "wharf"\nversion = "0.1.0"\nedition = "2024"\n\n[workspace]\n\n'
        printf '[lib]\ndoctest = false\n\n[profile.dev]\ndebug = "line-tables-only"\n\n[dependencies]\n'
        grep -E '^(serde|serde_json|http|ring|subtle) = ' Cargo.toml
        printf '\n[dev-dependencies]\n'
        grep -E '^proptest = ' Cargo.toml
    } >"$tree/Cargo.toml"
    # Whoever edits the scheduler meanwhile does not change what is tested.
    cp -r "$tree" "$whole"
}

part() { # part NAME old|new: that text of a fault
    awk -v part="--- $2" '/^--- / { on = ($0 == part); next } on' "$faults/$1.txt"
}

field() { sed -n "s/^$2: //p" "$faults/$1.txt" | head -n 1; }

plant() { # plant NAME
    local file old new text without
    file=$(field "$1" file) old=$(part "$1" old) new=$(part "$1" new)
    text=$(cat "$whole/$file")
    without=${text//"$old"/}
    [ -n "$old" ] && [ $((${#text} - ${#without})) -eq ${#old} ] || return 1
    printf '%s\n' "${text/"$old"/"$new"}" >"$tree/$file"
}

suites=(unit small_world sim)
suite() { # suite NAME: runs it
    case $1 in
    unit) timeout "$limit" cargo test --lib scheduler ;;
    *) timeout "$limit" cargo test --test "$1" ;;
    esac
}

first_failure() { # of a suite's output
    local name
    name=$(sed -n 's/^test \(.*\) \.\.\. FAILED.*/\1/p' "$1" | sort | head -n 1)
    echo "${name:-does not end}"
}

try() { # try NAME: prints its row; false if nothing caught it
    local name=$1 log=$place/$1.log suite status
    plant "$name" || { printf '%-26s DOES NOT APPLY\n' "$name"; return 1; }
    for suite in "${suites[@]}"; do
        (cd "$tree" && suite "$suite") >"$log" 2>&1
        status=$?
        if grep -q '^error: could not compile' "$log"; then
            printf '%-26s DOES NOT COMPILE (%s)\n' "$name" "${log#"$root/"}"
            return 1
        elif [ $status -ne 0 ]; then
            printf '%-26s %-12s %s\n' "$name" "$suite" "$(first_failure "$log")"
            return 0
        fi
    done
    printf '%-26s SURVIVED: %s\n' "$name" "$(field "$name" breaks)"
    return 1
}

lay_out
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for file in "$faults"/*.txt; do names+=("$(basename "$file" .txt)"); done
    # Without a fault everything passes, or the table says nothing.
    for suite in "${suites[@]}"; do
        (cd "$tree" && suite "$suite") >"$place/none.log" 2>&1 ||
            { echo "without any fault $suite fails: $place/none.log" >&2; exit 1; }
    done
fi
bad=0
printf '%-26s %-12s %s\n' fault 'caught by' test
for name in "${names[@]}"; do
    try "$name" || bad=$((bad + 1))
    file=$(field "$name" file)
    [ -e "$whole/$file" ] && cp "$whole/$file" "$tree/$file"
done
echo "${#names[@]} faults, $bad not caught"
[ "$bad" -eq 0 ]
