#!/bin/bash
# Makes images without a registry: FROM scratch, a program, and the shared libraries it needs.
#
#   image.sh HOST NAME PROGRAM [PATH…]   /PROGRAM's basename is the entrypoint; each PATH (file or
#                                        folder) is copied to the same place in the image, with the
#                                        libraries it needs
#   image.sh HOST --busybox              wharf-test/busybox:1, a static shell with an HTTP server
#
# HOST: unix:///… or tcp://…
set -euo pipefail

fail() { echo "image.sh: $*" >&2; exit 1; }

# Shared libraries of a program, loader included; nothing for a static one.
libraries() { ldd "$1" 2>/dev/null | sed -nE 's/^.*(=> |\t)(\/[^ ]+) \(0x.*$/\2/p' | sort -u; }

add() {
    local root=$1 file=$2
    mkdir -p "$root$(dirname "$file")"
    # -T: the folder may be there already, made for a library in it.
    cp -LrT "$file" "$root$file"
}

add_libraries() {
    local root=$1 file=$2 library
    for library in $(libraries "$file"); do
        [ -e "$root$library" ] || add "$root" "$library"
    done
}

import() {
    local host=$1 name=$2 root=$3 entrypoint=$4
    tar -C "$root" -c . | docker -H "$host" import \
        --change "ENTRYPOINT $entrypoint" - "$name" >/dev/null
    echo "$name"
}

program_image() {
    local host=$1 name=$2 program=$3 path file; shift 3
    mkdir -p "$root"/{tmp,etc}
    cp -L "$program" "$root/"
    add_libraries "$root" "$program"
    for path in "$@"; do
        add "$root" "$path"
        while read -r file; do add_libraries "$root" "$file"; done \
            < <(find -L "$path" -type f \( -perm -u+x -o -name '*.so*' \))
    done
    import "$host" "$name" "$root" "[\"/$(basename "$program")\"]"
}

busybox_image() {
    local host=$1 cache busybox
    busybox=$(command -v busybox || true)
    if [ -z "$busybox" ] || [ -n "$(libraries "$busybox")" ]; then
        cache=$(cd "$(dirname "$0")/../.." && pwd)/target/busybox
        busybox=$cache/bin/busybox
        if [ ! -x "$busybox" ]; then
            mkdir -p "$cache"
            (cd "$cache" && apt-get -qq download busybox-static >&2 && dpkg -x busybox-static_*.deb .) \
                || fail "busybox-static cannot be had"
            [ -x "$busybox" ] || busybox=$cache/usr/bin/busybox
        fi
    fi
    mkdir -p "$root"/{bin,tmp,www}
    cp -L "$busybox" "$root/bin/busybox"
    ln -s busybox "$root/bin/sh"
    echo ready >"$root/www/health"
    import "$host" wharf-test/busybox:1 "$root" '["/bin/busybox"]'
}

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
command -v docker >/dev/null || fail "the docker command is missing"
case "${1:-}:${2:-}" in
    ?*:--busybox) busybox_image "$1" ;;
    ?*:?*) [ $# -ge 3 ] || fail "no program given"; program_image "$@" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
