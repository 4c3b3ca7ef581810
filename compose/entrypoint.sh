#!/bin/sh
# Gives up root where the Docker socket allows it: its group is all that is needed to use it.
set -eu
socket=/var/run/docker.sock
if [ "$(id -u)" = 0 ] && [ "${WHARF_ROOT:-}" != 1 ] && [ -S "$socket" ] && command -v setpriv >/dev/null; then
    group=$(stat -c %g "$socket")
    if [ "$group" != 0 ]; then
        chown -R 10001:10001 /var/lib/wharf
        exec setpriv --reuid 10001 --regid 10001 --groups "$group" wharf "$@"
    fi
fi
exec wharf "$@"
