#!/usr/bin/env bash
# Swaps with stand-ins, with llama-server, and in Docker as far as they can be had here.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$PWD/.cache/bench
mkdir -p "$work"
skip() { echo "left out: $1"; }
if server=$(tests/support/setup.sh llama ada bob 2>"$work/setup-llama.log"); then
    export WHARF_TEST_LLAMA=$server WHARF_TEST_GGUF=$PWD/.cache/gguf
fi
if [ -z "${WHARF_TEST_DOCKER:-}" ]; then . tests/support/docker_env.sh; fi
cargo bench --locked --bench swap -- "$@"
