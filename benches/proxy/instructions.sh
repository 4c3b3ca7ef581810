#!/usr/bin/env bash
# How many instructions Wharf needs for one proxied JSON request, and which functions they are in:
# instructions.sh [REQUESTS]. Counted by callgrind between a short and a long series of requests,
# so that start-up and what happens in the background do not count. Kernel time is not in it.
#
#   WHARF, BENCH   paths of the two binaries, instead of building them
#   TOP            number of functions shown (25)
set -euo pipefail
cd "$(dirname "$0")/../.."
requests=${1:-1000}
short=$((requests / 10 > 0 ? requests / 10 : 1))
top=${TOP:-25}
work=$(mktemp -d)
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT

if [ -z "${WHARF:-}" ] || [ -z "${BENCH:-}" ]; then
    built=$(cargo bench --locked --bench proxy --no-run --message-format=json 2>"$work/build.log") ||
        { cat "$work/build.log" >&2; exit 1; }
fi
executable() { # executable NAME: of what was just built
    printf '%s\n' "$built" | grep "\"name\":\"$1\"" | grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d'"' -f4
}
bench=${BENCH:-$(executable proxy)}
wharf=${WHARF:-$(executable wharf)}

port() { # a port that is free just now
    local port
    for port in $(shuf -i 20000-29999 -n 50); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
    exit 1
}
upstream=127.0.0.1:$(port) gateway=127.0.0.1:$(port) control=127.0.0.1:$(port)
"$bench" upstream "$upstream" &
pids+=($!)
{
    echo "listen: { gateway: \"$gateway\", orchestrator: \"$control\" }"
    echo "store: $work/wharf.db"
    "$bench" models "$upstream"
} >"$work/models.yaml"
valgrind --tool=callgrind --callgrind-out-file="$work/out" --separate-threads=no \
    "$wharf" serve --config "$work/models.yaml" >"$work/log" 2>&1 &
wharf_pid=$!
pids+=("$wharf_pid")

for _ in $(seq 240); do # a start under valgrind takes a while
    "$bench" drive "$gateway" 50 2>/dev/null && break
    kill -0 "$wharf_pid" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.5
done
measure() { # measure REQUESTS NAME: the counts of these alone, in $work/NAME
    callgrind_control --zero "$wharf_pid" >/dev/null 2>&1
    "$bench" drive "$gateway" "$1"
    callgrind_control --dump="$2" "$wharf_pid" >/dev/null 2>&1
    local dump
    dump=$(grep -lE "^desc: Trigger: .*$2" "$work"/out* | head -n 1)
    mv "$dump" "$work/$2"
}
total() { awk '/^(totals|summary):/ { print $2; exit }' "$work/$1"; }
"$bench" drive "$gateway" 500
measure "$short" short
measure "$requests" long
each=$((($(total long) - $(total short)) / (requests - short)))
echo "instructions per proxied request: $each (callgrind, $requests less $short requests, $("$wharf" --version))"

# Not callgrind_annotate: functions that were never left while we counted confuse it.
costs() { # costs FILE: own and inclusive cost of each function
    awk '
        function learn(line) { # (id) name, and later only (id)
            id = line; sub(/^c?fn=\(/, "", id); sub(/\).*/, "", id)
            if (sub(/^c?fn=\([0-9]+\) /, "", line)) name[id] = line
            return id
        }
        /^fn=/ { current = learn($0); next }
        /^cfn=/ { learn($0); next }
        /^calls=/ { getline; all[current] += $NF; next }
        /^[0-9+*-]/ { own[current] += $NF; all[current] += $NF }
        END { for (id in all) printf "%d\t%d\t%s\n", own[id], all[id], name[id] }' "$1"
}
show() { # show COLUMN
    costs "$work/long" | sort -t "$(printf '\t')" -k "$1,$1nr" |
        awk -F'\t' -v column="$1" -v n="$requests" -v top="$top" \
            'NR <= top { printf "%9.0f  %s\n", $column / n, substr($3, 1, 110) }'
}
echo
echo "by function, without what it calls:"
show 1
echo
echo "by function, with what it calls:"
show 2
