#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/../.."
server=$(tests/support/setup.sh llama ada bob)
large=$PWD/.cache/gguf/large.gguf
[ -s "$large" ] || .cache/venv/bin/python tests/support/make_gguf.py --large .cache/gguf large
export WHARF_TEST_LLAMA=$server WHARF_TEST_LARGE_GGUF=$large
cargo bench --locked --bench read_ahead
