# Sourced by the script that installs services: what the tests on a Ceph gateway need. May run again.
install_ceph() {
  command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null && return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: radosgw ceph-mon ceph-osd ceph-common; the tests on Ceph are skipped" >&2
    return 0
  fi
  apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common curl
}
