#!/bin/bash
# A private Docker Engine for tests: own data, own socket, own bridge, no iptables rules, so that
# neither a Docker that is already installed nor the machine's firewall is touched.
#
#   dockerd.sh start DIR [DOCKERD-FLAGS…]   prints unix://DIR/docker.sock once it answers
#   dockerd.sh stop DIR                     ends it and its containers, removes its bridge
#   dockerd.sh down DIR                     ends it alone; what becomes of containers is up to it
#   dockerd.sh kill DIR                     SIGKILL (a crash); `start` brings it back on its data
#   dockerd.sh available                    exits 0 if this machine can run one (says why not)
#
# DIR/daemon.json, if it is there, is the engine's configuration.
# WHARF_DOCKER_PATH: folder(s) searched first for dockerd, containerd and docker (see docker26.sh).
# DIR must be short: a socket's path holds 107 bytes.
set -euo pipefail

PATH="${WHARF_DOCKER_PATH:+$WHARF_DOCKER_PATH:}$PATH:/usr/sbin:/sbin"
DEADLINE_SECONDS=60

fail() { echo "dockerd.sh: $*" >&2; exit 1; }

available() {
    [ "$(id -u)" = 0 ] || fail "not root: a private Docker Engine cannot be started"
    for tool in dockerd containerd runc ip curl; do
        command -v "$tool" >/dev/null || fail "$tool is missing (apt-get install --no-install-recommends docker.io)"
    done
}

answers() { curl -s -o /dev/null --max-time 2 --unix-socket "$1/docker.sock" http://docker/_ping; }

# One bridge a folder, so that several engines can run side by side.
bridge_of() { printf 'whbr%s' "$(printf '%s' "$1" | cksum | cut -c1-6)"; }

make_bridge() {
    local bridge=$1 octet lock taken
    # Two engines that start at once must not take the same subnet.
    exec {lock}>/tmp/wharf-dockerd.lock
    flock -w "$DEADLINE_SECONDS" "$lock"
    if ip link show "$bridge" >/dev/null 2>&1; then exec {lock}>&-; return; fi
    taken=$(ip -4 addr show)
    for octet in $(seq 200 250); do
        if [[ "$taken" != *"172.29.$octet."* ]]; then
            # Of its own accord a bridge takes the lowest address among its ports: with each container
            # that comes or goes it may change, and the others lose their gateway for half a minute.
            ip link add "$bridge" address "$(printf '02:42:ac:1d:%02x:01' "$octet")" type bridge
            ip addr add "172.29.$octet.1/24" dev "$bridge"
            ip link set "$bridge" up
            exec {lock}>&-
            return
        fi
    done
    fail "no free subnet for a bridge"
}

runs() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

start() {
    local dir=$1; shift
    available
    [ "$(printf '%s/docker.sock' "$dir" | wc -c)" -le 107 ] || fail "$dir is too long for a socket's path"
    mkdir -p "$dir"
    if ! runs "$dir/docker.pid"; then
        rm -f "$dir/docker.pid" "$dir/docker.sock"
        make_bridge "$(bridge_of "$dir")"
        # A session of its own: Ctrl-C in a test run must not reach it before the tests clean up.
        [ -e "$dir/daemon.json" ] || echo '{}' >"$dir/daemon.json"
        setsid dockerd --config-file "$dir/daemon.json" --data-root "$dir/data" --exec-root "$dir/exec" --pidfile "$dir/docker.pid" \
            -H "unix://$dir/docker.sock" --bridge "$(bridge_of "$dir")" \
            --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
            "$@" >>"$dir/log" 2>&1 </dev/null &
    fi
    for _ in $(seq $((DEADLINE_SECONDS * 20))); do
        if answers "$dir"; then echo "unix://$dir/docker.sock"; return; fi
        sleep 0.05
    done
    tail -20 "$dir/log" >&2
    fail "no answer within $DEADLINE_SECONDS s; its log: $dir/log"
}

wait_gone() {
    for _ in $(seq $((DEADLINE_SECONDS * 20))); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.05
    done
    return 1
}

stop() {
    local dir=$1 pid
    if runs "$dir/docker.pid"; then
        pid=$(cat "$dir/docker.pid")
        # Containers too: under --live-restore they would outlive the engine.
        docker -H "unix://$dir/docker.sock" ps -aq 2>/dev/null \
            | xargs -r docker -H "unix://$dir/docker.sock" rm -f >/dev/null 2>&1 || true
        kill "$pid"
        wait_gone "$pid" || kill -9 "$pid"
    fi
    sweep "$dir"
    ip link del "$(bridge_of "$dir")" 2>/dev/null || true
}

# What a crash or --live-restore leaves: containers with their shims, and mounts.
sweep() {
    local dir=$1 shim children mount
    for shim in $(grep -lsF -- "$dir/exec/" /proc/[0-9]*/cmdline | cut -d/ -f3); do
        [[ "$(cat "/proc/$shim/comm" 2>/dev/null)" == containerd-shim* ]] || continue
        children=$(cat /proc/"$shim"/task/*/children 2>/dev/null || true)
        # shellcheck disable=SC2086
        [ -z "$children" ] || kill -9 $children 2>/dev/null || true
        kill -9 "$shim" 2>/dev/null || true
    done
    awk -v dir="$dir/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | sort -r \
        | while read -r mount; do umount -l "$mount" 2>/dev/null || true; done
}

down() {
    local pid
    pid=$(cat "$1/docker.pid")
    kill "$pid"
    wait_gone "$pid" || fail "does not end"
}

crash() {
    local dir=$1 pid containerd
    pid=$(cat "$dir/docker.pid")
    containerd=$(cat "$dir/exec/containerd/containerd.pid" 2>/dev/null || true)
    kill -9 "$pid"
    wait_gone "$pid"
    # The next dockerd starts its own containerd; a leftover one would hold its lock.
    [ -z "$containerd" ] || kill "$containerd" 2>/dev/null || true
    [ -z "$containerd" ] || wait_gone "$containerd" || kill -9 "$containerd" || true
}

case "${1:-}" in
    start) shift; start "$@" ;;
    stop) stop "$2" ;;
    down) down "$2" ;;
    kill) crash "$2" ;;
    available) available ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
