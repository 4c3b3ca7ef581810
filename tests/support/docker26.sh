#!/bin/bash
# Debian trixie's Docker 26.1 (API 1.45) beside whatever Docker is installed: packages are
# downloaded with a package list of their own and unpacked into a cache folder; nothing is
# installed and the machine's package state is not changed.
#
#   WHARF_DOCKER_PATH=$(docker26.sh [CACHE]) dockerd.sh start DIR
#
# Prints the folders to search first. runc is taken from the system: trixie's needs a newer libc.
set -euo pipefail

cache=${1:-$(cd "$(dirname "$0")/../.." && pwd)/target/docker26}
path="$cache/usr/bin:$cache/usr/sbin"
if [ -x "$cache/usr/sbin/dockerd" ]; then echo "$path"; exit 0; fi

fail() { echo "docker26.sh: $*" >&2; exit 1; }
command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "not a Debian machine"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f "$keyring" ] || fail "$keyring is missing"

# The mirror that this machine already uses.
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } \
    | sed -nE 's/^(URIs:|deb( \[[^]]*\])?) *(https?:\/\/[^ ]*\/debian)\/?( .*)?$/\3/p' | head -1)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{parts,lists/partial,cache/archives/partial,debs,root}
printf 'Types: deb\nURIs: %s\nSuites: trixie\nComponents: main\nSigned-By: %s\n' \
    "${mirror:-http://deb.debian.org/debian}" "$keyring" >"$scratch/parts/trixie.sources"

apt=(apt-get -qq
    -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$scratch/parts"
    -o Dir::State::lists="$scratch/lists" -o Dir::Cache="$scratch/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update >&2
(cd "$scratch/debs" && "${apt[@]}" download \
    docker.io/trixie docker-cli/trixie docker-buildx/trixie docker-compose/trixie containerd/trixie tini/trixie >&2)
for deb in "$scratch"/debs/*.deb; do dpkg -x "$deb" "$scratch/root"; done
mkdir -p "$(dirname "$cache")"
rm -rf "$cache"
mv "$scratch/root" "$cache"
echo "$path"
