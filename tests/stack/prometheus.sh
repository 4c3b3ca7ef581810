#!/usr/bin/env bash
# A real Prometheus scrapes a real Wharf while it swaps; then every query of every dashboard must
# return data. Also: promtool on the metrics, types and layout of the dashboards.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() { echo "SKIPPED: $1"; echo "$1" >>"${WHARF_SKIP_FILE:-/dev/null}"; exit 0; }
tests/support/setup.sh prometheus >/dev/null || skip "Prometheus and dashboards: prometheus cannot be installed"
command -v npm >/dev/null || skip "Prometheus and dashboards: npm is not installed"

cargo build --locked --bin wharf
wharf=$PWD/target/debug/wharf
work=$(mktemp -d)
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT
. tests/support/free_port.sh
for port in gateway control prometheus; do free "$port"; done

model() { # model NAME VRAM [FLAGS]
    echo "  $1: { engine: openai, vram: $2, process: { cmd: \"$wharf engine --host 127.0.0.1 --port \${PORT} --name $1 --vram $2 --load 300ms ${3:-}\" } }"
}
cat >"$work/models.yaml" <<YAML
listen: { gateway: 127.0.0.1:$gateway, orchestrator: 127.0.0.1:$control }
engine_ports: 28051-28099
gpu: { provider: simulated, memory: [24GiB], release_lag: 200ms }
swap: { min_residency: 100ms }
models:
$(model mistral 13GiB)
$(model coder 17GiB)
$(model fragile 5GiB "--crash-on-request 2")
$(model broken 5GiB "--fatal-line 'CUDA out of memory'")
YAML
cat >"$work/prometheus.yml" <<YAML
global: { scrape_interval: 1s }
scrape_configs: [{ job_name: wharf, static_configs: [{ targets: ["127.0.0.1:$control"] }] }]
YAML
(cd "$work" && exec "$wharf" serve) >"$work/wharf.log" 2>&1 &
pids+=($!)
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/data" \
    --web.listen-address="127.0.0.1:$prometheus" >"$work/prometheus.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do curl -sf "http://127.0.0.1:$control/status" >/dev/null && break; sleep 0.1; done
for _ in $(seq 100); do curl -sf "http://127.0.0.1:$prometheus/-/ready" >/dev/null && break; sleep 0.1; done
up() { curl -sf "http://127.0.0.1:$prometheus/api/v1/query?query=up" | grep -q '"1"\]'; }
for _ in $(seq 100); do up && break; sleep 0.2; done
up || { echo "the target is not up"; cat "$work/wharf.log" "$work/prometheus.log"; exit 1; }

ask() { # ask MODEL STREAM
    curl -s -o /dev/null -m 30 "http://127.0.0.1:$gateway/v1/chat/completions" \
        -d "{\"model\":\"$1\",\"stream\":$2,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}" || true
}
for _ in 1 2 3; do
    ask mistral true & first=$!
    ask coder false
    wait "$first"
    ask fragile true
    ask broken false
    sleep 1.5
done
sleep 3

curl -s "http://127.0.0.1:$control/metrics" >"$work/metrics"
promtool check metrics <"$work/metrics"
echo "promtool check metrics: clean ($(grep -vc '^#' "$work/metrics") series)"
# The last samples come when they are scraped, which a busy machine does late.
check() { node tests/support/dashboards/check.mjs --prometheus "http://127.0.0.1:$prometheus"; }
until=$((SECONDS + 30))
until check >"$work/check" 2>&1; do
    [ $SECONDS -lt $until ] || { cat "$work/check"; tail -30 "$work/wharf.log"; exit 1; }
    sleep 1
done
cat "$work/check"
