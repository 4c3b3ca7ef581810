#!/usr/bin/env bash
# The compose stack for real, as far as that goes without a registry: both profiles validate; the
# CPU profile is built, comes up healthy, swaps once through the mounted socket, and is scraped.
#
# Images are made from this machine's own files. BUILDER holds the `wharf` of target/debug as
# /wharf (BINARY=prebuilt): a Rust toolchain in an image, and a release build in it, would take
# minutes. Prometheus is Debian's. Grafana's image cannot be made here and is left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() { echo "SKIPPED: $1"; echo "$1" >>"${WHARF_SKIP_FILE:-/dev/null}"; exit 0; }
fail() { echo "FAILED: $*" >&2; exit 1; }

# On the engine that the test script started, the newer one first.
host=${WHARF_TEST_DOCKER26:-${WHARF_TEST_DOCKER:-}}
[ -n "$host" ] || skip "compose stack: WHARF_TEST_DOCKER names no Docker Engine"
case $host in unix://*) ;; *) skip "compose stack: $host is no socket that could be mounted" ;; esac
tests/support/setup.sh prometheus >/dev/null || skip "compose stack: prometheus cannot be installed"

work=$(mktemp -d)
export DOCKER_CONFIG=$work/docker DOCKER_HOST=$host
mkdir -p "$DOCKER_CONFIG" "$work/empty/data"
tools=$(tests/support/docker26.sh 2>/dev/null || true)
if [ -n "$tools" ]; then
    PATH=$tools:$PATH
    printf '{"cliPluginsExtraDirs": ["%s"]}\n' "${tools%%/bin:*}/libexec/docker/cli-plugins" >"$DOCKER_CONFIG/config.json"
fi
docker compose version >/dev/null 2>&1 || skip "compose stack: Docker Compose 2 cannot be had"
echo "$(docker compose version), $(docker version --format 'Docker Engine {{.Server.Version}} (API {{.Server.APIVersion}})')"

. tests/support/free_port.sh
project=wharf-test-$$
export DOCKER_SOCKET=${host#unix://} WHARF_NAME=$project-wharf WHARF_IMAGE=$project/wharf:1
export BUILDER=$project/builder:1 RUNTIME=$project/runtime:1 BINARY=prebuilt PROMETHEUS_IMAGE=$project/prometheus:1
for port in WHARF_GATEWAY_PORT WHARF_ORCHESTRATOR_PORT PROMETHEUS_PORT; do free "$port"; done
export WHARF_GATEWAY_PORT WHARF_ORCHESTRATOR_PORT PROMETHEUS_PORT
compose() { timeout 300 docker compose -p "$project" -f compose/compose.yaml --profile cpu "$@"; }
engines() { docker ps -a --filter "network=${project}_wharf" --filter label=wharf.model "$@"; }

finish() {
    local status=$?
    [ "$status" = 0 ] || { compose ps -a; compose logs --tail 60; } 2>&1 | tail -n 150
    engines -q | xargs -r docker rm -f >/dev/null 2>&1 || true
    compose down -v --timeout 20 >/dev/null 2>&1 || true
    docker images -q "$project/*" | xargs -r docker rmi -f >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT

# 1. Both profiles validate, also with the images that users get.
for profile in nvidia cpu; do
    env -u WHARF_IMAGE -u BUILDER -u RUNTIME -u PROMETHEUS_IMAGE -u DOCKER_SOCKET \
        docker compose -f compose/compose.yaml --profile "$profile" config --format json >"$work/$profile.json"
    python3 - "$work/$profile.json" "$profile" <<'PY'
import json, sys
stack = json.load(open(sys.argv[1]))
services = stack["services"]
open_ports = [(name, port) for name, service in services.items() for port in service.get("ports", [])
              if port.get("host_ip") != "127.0.0.1"]
assert not open_ports, f"published beyond this machine: {open_ports}"
assert len(services) == 3, list(services)
assert all(service.get("init") for name, service in services.items() if name.startswith("wharf")), "no init"
print(f"profile {sys.argv[2]} validates: {', '.join(sorted(services))}")
PY
done

# 2. Images.
image() { tests/support/image.sh "$host" "$@"; }
cargo build --locked --bin wharf
shared=$(ldd target/debug/wharf | sed -nE 's/^.*=> (\/[^ ]+) .*$/\1/p')
tool() { command -v "$1" || fail "$1 is missing"; }
# shellcheck disable=SC2086
image "$RUNTIME" "$(tool sh)" /bin/sh "$(tool id)" "$(tool cat)" "$(tool stat)" "$(tool chown)" "$(tool setpriv)" $shared
image "$BUILDER" target/debug/wharf
cp "$(tool prometheus)" "$work/prometheus-server"
image "$project/prometheus-base:1" "$work/prometheus-server"
# As in the official image: a user without rights, who owns the data folder.
touch "$work/empty/data/.keep"
printf 'FROM %s\nCOPY --chown=65534:65534 data /prometheus\nUSER 65534:65534\n' "$project/prometheus-base:1" \
    | timeout 300 docker build -q -t "$PROMETHEUS_IMAGE" -f - "$work/empty" >/dev/null
compose build --quiet wharf-cpu
echo "built $WHARF_IMAGE from compose/Dockerfile"

# 3. Up, and healthy by the image's own health check.
began=$SECONDS
compose up -d --no-build --wait --wait-timeout 120 wharf-cpu prometheus 2>&1 | tail -n 5
[ "$(docker inspect --format '{{.State.Health.Status}}' "$WHARF_NAME")" = healthy ] || fail "not healthy"
echo "healthy after $((SECONDS - began)) s"
user=$(docker top "$WHARF_NAME" -eo pid,uid,comm | awk '$3 == "wharf" { print $2 }')
[ "$user" = 10001 ] || fail "Wharf runs as user $user, although the socket's group may write"
echo "Wharf runs as user $user"

# An orphan in a session of its own falls to the container's first process, which must bury it.
docker exec "$WHARF_NAME" sh -c '(i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done) >/dev/null 2>&1 &'
first=$(docker inspect --format '{{.State.Pid}}' "$WHARF_NAME")
orphans() { ps --ppid "$first" -o stat=,comm= | awk '$2 != "wharf"' || true; }
for _ in $(seq 100); do
    left=$(orphans)
    [ -n "$left" ] || break
    sleep 0.1
done
[ -z "$left" ] || fail "not buried: $left"
echo "no zombie is left"

# 4. One request per model, with the key that was made at first start.
key=$(docker exec "$WHARF_NAME" cat /var/lib/wharf/key)
[ ${#key} -ge 32 ] || fail "no key was made"
gateway=http://127.0.0.1:$WHARF_GATEWAY_PORT control=http://127.0.0.1:$WHARF_ORCHESTRATOR_PORT
ask() { # ask MODEL [CURL-FLAGS…]
    local model=$1; shift
    curl -s -m 90 "$@" "$gateway/v1/chat/completions" -H 'content-type: application/json' \
        -d "{\"model\":\"$model\",\"max_tokens\":8,\"messages\":[{\"role\":\"user\",\"content\":\"who are you?\"}]}"
}
with_key() { curl -s -m 30 -H "Authorization: Bearer $key" "$@"; }
status=$(ask mistral -o /dev/null -w '%{http_code}')
[ "$status" = 401 ] || fail "a request without the key got $status"
for model in mistral coder llava; do
    answer=$(ask "$model" -H "Authorization: Bearer $key")
    python3 - "$model" "$answer" <<'PY'
import json, sys
model, answer = sys.argv[1], json.loads(sys.argv[2])
assert "error" not in answer, answer
text = answer["choices"][0]["message"]["content"]
assert answer["model"] == model and text.startswith(f"{model}-1"), answer
print(f"{model} answers: {text}")
PY
done
# 13 and 17 GiB do not fit into 24 together: there was a swap, through the mounted socket.
with_key "$control/swaps?limit=100" >"$work/swaps.json"
python3 - "$work/swaps.json" <<'PY'
import json, sys
swaps = {swap["model"]: swap for swap in json.load(open(sys.argv[1]))["swaps"] if swap["result"] == "ready"}
assert set(swaps) >= {"mistral", "coder", "llava"}, swaps
assert [victim["model"] for victim in swaps["coder"]["evicted"]] == ["mistral"], swaps["coder"]
print(f"swap mistral -> coder: {swaps['coder']['seconds']:.1f} s, {swaps['coder']['phases']}")
PY
# The engines are siblings on the stack's own network, and nothing of them is published.
published=$(engines --format '{{.Names}} {{.Ports}}' | grep -- '->' || true)
[ -z "$published" ] || fail "an engine is published: $published"
engines --format '{{.Names}}' | grep -q '^wharf-llava-' || fail "llava's container is not on the stack's network"

# 5. Prometheus, as a user without rights, reads the key and scrapes.
query() { curl -s -m 5 -G "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" --data-urlencode "query=$1"; }
value() { query "$1" | python3 -c 'import json, sys; r = json.load(sys.stdin)["data"]["result"]; print(r[0]["value"][1] if r else "nothing")' 2>/dev/null || true; }
until_value() { # until_value QUERY VALUE
    for _ in $(seq 100); do [ "$(value "$1")" = "$2" ] && return; sleep 0.3; done
    fail "$1 is $(value "$1"), not $2: $(curl -s "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/targets" | head -c 1500)"
}
until_value 'up{job="wharf"}' 1
until_value 'sum(orchestrator_model_swaps_total{to="coder"})' 1
echo "Prometheus: target up, swap counted"

# 6. Nothing is left behind.
began=$SECONDS
compose down -v 2>&1 | tail -n 3
left=$(docker ps -aq --filter "name=$project"; docker ps -aq --filter label=wharf.model; docker volume ls -q --filter "name=$project"; docker network ls -q --filter "name=$project")
[ -z "$left" ] || fail "left behind: $left"
echo "down after $((SECONDS - began)) s, nothing left"
