#!/bin/sh
# hold.sh COMMAND...: runs a server until standard input ends, which it does with the test process,
# however that ends. The first line of standard output is the process id of the server.
"$@" </dev/null >&2 &
server=$!
trap 'kill -KILL $server 2>/dev/null; wait $server 2>/dev/null' EXIT
trap 'exit 143' HUP INT TERM
echo "$server"
cat >/dev/null
