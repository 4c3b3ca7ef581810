# Sourced. free VARIABLE: a port below those that the kernel gives to outgoing connections.
last=$((10000 + $$ * 61 % 9000))
free() {
    while last=$((last + 1)); (: <>"/dev/tcp/127.0.0.1/$last") 2>/dev/null; do :; done
    printf -v "$1" %s "$last"
}
