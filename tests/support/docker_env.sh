# Sourced by tests/run.sh: exports WHARF_TEST_DOCKER (Debian's engine) and WHARF_TEST_DOCKER26
# (trixie's) where they run or can be started, and stops what it started when the script ends.
docker_dirs=()
stop_docker() {
    for dir in "${docker_dirs[@]}"; do tests/support/dockerd.sh stop "$dir" >/dev/null 2>&1; rm -rf "$dir"; done
}
trap stop_docker EXIT

start_docker() { # start_docker VARIABLE NAME
    local dir host
    dir=$(mktemp -d /tmp/whd.XXXX)
    docker_dirs+=("$dir")
    if host=$(tests/support/dockerd.sh start "$dir" 2>"$work/dockerd-$2.log"); then
        export "$1=$host"
        printf '%-14s%s\n' "$2" "$(DOCKER_HOST=$host docker version --format 'Docker Engine {{.Server.Version}} (API {{.Server.APIVersion}})' 2>/dev/null)"
    else
        skip "$2: $(tail -n 1 "$work/dockerd-$2.log")" "$2"
    fi
}

if ! tests/support/dockerd.sh available >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq >/dev/null 2>&1
    # Debian starts a daemon of its own after installing; the tests bring theirs.
    [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; policy=1; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker.io iptables iproute2 curl busybox-static >"$work/apt-docker.log" 2>&1
    [ -z "${policy:-}" ] || rm -f /usr/sbin/policy-rc.d
    hash -r
fi
if reason=$(tests/support/dockerd.sh available 2>&1); then
    start_docker WHARF_TEST_DOCKER docker
    if path=$(tests/support/docker26.sh 2>"$work/docker26.log"); then
        WHARF_DOCKER_PATH=$path start_docker WHARF_TEST_DOCKER26 docker26
        export WHARF_DOCKER26_PATH=$path
    else
        skip "docker26: $(tail -n 1 "$work/docker26.log")" docker26
    fi
else
    skip "docker: $reason" docker
fi
