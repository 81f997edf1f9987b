#!/usr/bin/env bash
# ceph.sh DIR: runs a Ceph cluster on this machine until standard input ends, for tests: a monitor,
# one OSD with its data in memory, and radosgw, the S3 server of Ceph. Everything listens on
# 127.0.0.1, every file is below DIR, which must exist and be empty.
#
# When all of it answers, standard output gets NAME=VALUE lines and the line "ready".
# Debian packages: ceph-mon ceph-osd radosgw ceph-common. No ceph-mgr: it only collects numbers.
set -euo pipefail

dir=$1
limit=60 # seconds for each step; an idle machine needs one
conf=$dir/ceph.conf
daemons=()

# radosgw ends before the OSD and the OSD before the monitor, so that none waits for a daemon that
# has ended. A daemon that does not follow TERM within 5 seconds, as a stopped one, is killed.
finish() {
    local at pid i
    for ((at = ${#daemons[@]} - 1; at >= 0; at--)); do
        pid=${daemons[at]}
        kill -TERM "$pid" 2>/dev/null || continue
        for ((i = 0; i < 100; i++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.05
        done
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}
trap finish EXIT
trap 'exit 143' HUP INT TERM

# Every wait below ends early if a daemon is gone, and then shows the last lines of the logs.
until_true() {
    local what=$1 end=$((SECONDS + limit)) pid
    shift
    until "$@" >/dev/null 2>&1; do
        for pid in "${daemons[@]}"; do
            kill -0 "$pid" 2>/dev/null || { tail -n 15 "$dir"/*.log >&2; exit 1; }
        done
        if ((SECONDS > end)); then
            echo "ceph.sh: no $what after $limit seconds" >&2
            exit 1
        fi
        sleep 0.1
    done
}

daemon() {
    "$@" </dev/null >>"$dir/daemons.log" 2>&1 &
    daemons+=($!)
}

# Ports below the range of outgoing connections, so that none of those takes one before a daemon
# does.
read -r mon_port s3_port < <(python3 -I -c '
import random, socket
free = []
while len(free) < 2:
    port = random.randrange(12000, 32000)
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            continue
    if port not in free:
        free.append(port)
print(*free)')
read -r access secret < <(python3 -I -c 'import secrets; print(secrets.token_hex(10), secrets.token_hex(20))')
fsid=$(cat /proc/sys/kernel/random/uuid)
osd=$(cat /proc/sys/kernel/random/uuid)
mkdir "$dir"/{mon,osd,radosgw,run}

# What differs from the defaults, and why:
# public_addr, cluster_addr: Ceph looks for no address on the loopback device by itself.
# admin_socket: the name of a socket has at most 107 bytes.
# mon_data_avail_crit: a monitor on a file system that is 95 % full ends itself.
# paxos_propose_interval: with 1 second, each of the pools of radosgw takes one.
# tcp_nodelay: without it, each short answer waits 40 ms for a delayed acknowledgement.
cat >"$conf" <<CONF
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$mon_port/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr1 = false
keyring = $dir/keyring
run_dir = $dir/run
crash_dir = $dir/run
log_file = $dir/\$type.log
admin_socket =
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
[mon]
mon_data = $dir/mon
mon_cluster_log_file = $dir/cluster.log
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 2
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
paxos_propose_interval = 0.05
[osd]
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
[client.radosgw]
rgw_data = $dir/radosgw
rgw_frontends = beast endpoint=127.0.0.1:$s3_port tcp_nodelay=1
rgw_exit_timeout_secs = 5
rgw_run_sync_thread = false
CONF

ring() {
    ceph-authtool -c "$conf" "$dir/keyring" --gen-key "$@" >/dev/null
}
ceph-authtool -c "$conf" --create-keyring "$dir/keyring" >/dev/null
ring -n mon. --cap mon 'allow *'
ring -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ring -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
ring -n client.radosgw --cap mon 'allow rw' --cap osd 'allow rwx'

monmaptool --create --clobber --enable-all-features --fsid "$fsid" \
    --addv a "[v2:127.0.0.1:$mon_port]" "$dir/monmap" >/dev/null
ceph-mon -c "$conf" --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
daemon ceph-mon -c "$conf" -i a -f
until_true monitor ceph -c "$conf" --connect-timeout 5 mon stat

ceph -c "$conf" osd new "$osd" 0 >/dev/null
ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd" >>"$dir/daemons.log" 2>&1
daemon ceph-osd -c "$conf" -i 0 -f
until_true OSD sh -c 'ceph -c "$0" osd stat | grep -q "1 up"' "$conf"
ceph -c "$conf" osd pool create rbd 8 >>"$dir/daemons.log" 2>&1
ceph -c "$conf" osd pool application enable rbd rbd >>"$dir/daemons.log" 2>&1

daemon radosgw -c "$conf" -n client.radosgw -f
until_true radosgw curl --silent --fail --max-time 2 --output /dev/null "http://127.0.0.1:$s3_port/"
radosgw-admin -c "$conf" user create --uid test --display-name test \
    --access-key "$access" --secret-key "$secret" >>"$dir/daemons.log" 2>&1

echo "ENDPOINT=http://127.0.0.1:$s3_port"
echo "ACCESS_KEY=$access"
echo "SECRET_KEY=$secret"
echo "CEPH_CONF=$conf"
echo ready
cat >/dev/null
