#!/usr/bin/env bash
# A one-node Ceph object gateway on loopback: a production S3 server (mon + in-memory osd + radosgw), for tests and benchmarks.
#   ceph-rgw.sh start DIR [PORT]   start it with its state in DIR (default port 7480; PORT+1 .. PORT+60 are used inside); ready in about 13 s
#   ceph-rgw.sh stop DIR           end it and remove DIR
# Needs (Debian): apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common     (64 MB to download)
# Then: endpoint http://127.0.0.1:PORT, access key "test", secret key "testtest", region us-east-1, path-style addressing.
# Seen with Ceph 16.2: conditional PUT is atomic (100 rounds of 32 contenders: one winner each, for If-None-Match and for If-Match),
# but If-Match takes the ETag WITHOUT quotes only: a quoted one answers 412. AWS takes both.
set -euo pipefail
action=${1:?start or stop}; dir=${2:?a folder for its state}; port=${3:-7480}; monport=$((port + 1))

stop() {
  local pids=() pidfile
  for pidfile in "$dir"/run/*.pid; do [ -e "$pidfile" ] && pids+=("$(cat "$pidfile")"); done
  [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 50); do [ ${#pids[@]} -gt 0 ] && kill -0 "${pids[@]}" 2>/dev/null || break; sleep 0.2; done
  rm -rf "$dir"
}

if [ "$action" = stop ]; then stop; exit 0; fi
[ "$action" = start ] || { echo "ceph-rgw: start or stop" >&2; exit 2; }

rm -rf "$dir"; mkdir -p "$dir"/{mon,osd,run}; dir=$(cd "$dir" && pwd)
fsid=$(cat /proc/sys/kernel/random/uuid); osd_uuid=$(cat /proc/sys/kernel/random/uuid)
cat >"$dir/ceph.conf" <<EOF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$monport]
mon initial members = a
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# without authentication there is no key for the encrypted mode, which the gateway would insist on
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
ms bind port min = $((port + 10))
ms bind port max = $((port + 60))
osd objectstore = memstore
memstore device bytes = 2147483648
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 1
rgw dynamic resharding = false
run dir = $dir/run
admin socket = $dir/run/\$name.asok
log file = $dir/run/\$name.log
pid file = $dir/run/\$name.pid
[mon.a]
mon data = $dir/mon
mon addr = 127.0.0.1:$monport
[osd.0]
osd data = $dir/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$port
EOF
export CEPH_CONF=$dir/ceph.conf
quiet() { "$@" >>"$dir/run/start.log" 2>&1 || { tail -n 20 "$dir/run/start.log" >&2; echo "ceph-rgw: failed: $*" >&2; exit 1; }; }
quiet monmaptool --create --clobber --addv a "[v2:127.0.0.1:$monport]" --fsid "$fsid" "$dir/monmap"
quiet ceph-mon --mkfs -i a --monmap "$dir/monmap" --no-mon-config
quiet ceph-mon -i a
quiet timeout 30 ceph osd new "$osd_uuid"
quiet ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid"
quiet ceph-osd -i 0
quiet timeout 30 ceph osd crush add osd.0 1.0 root=default host=localhost
quiet timeout 90 radosgw-admin user create --uid=test --display-name=test --access-key=test --secret-key=testtest
quiet timeout 60 radosgw -n client.rgw
for _ in $(seq 150); do curl -s -o /dev/null "http://127.0.0.1:$port" && { echo "http://127.0.0.1:$port"; exit 0; }; sleep 0.2; done
echo "ceph-rgw: no answer on port $port" >&2; exit 1
