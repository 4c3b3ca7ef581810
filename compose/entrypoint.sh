#!/bin/sh
# Runs Wharf as user 10001 where that user can use the Docker socket through the socket's group;
# else (and with WHARF_ROOT=1) as it is. Commands of `docker compose exec` do not pass here.
set -eu
user=10001
socket=/var/run/docker.sock
state=/var/lib/wharf

if [ "$(id -u)" = 0 ] && [ "${WHARF_ROOT:-}" != 1 ] && [ -S "$socket" ]; then
    group=$(stat -c %g "$socket")
    drop="setpriv --reuid $user --regid $user --groups $group --no-new-privs"
    if $drop sh -c '[ -w "$0" ]' "$socket"; then
        chown -R "$user:$user" "$state"
        exec $drop wharf "$@"
    fi
    echo "wharf: runs as root: user $user may not write to $socket (its group $group has no right to)" >&2
fi
exec wharf "$@"
