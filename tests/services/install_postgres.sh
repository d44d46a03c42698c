# Sourced by the script that installs services: PostgreSQL and PgBouncer. May run again.
install_postgres() {
  local missing=""
  command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="postgresql"
  PATH="$PATH:/usr/sbin" command -v pgbouncer >/dev/null || missing="$missing pgbouncer"
  [ -z "$missing" ] && return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: $missing; the tests on PostgreSQL are skipped" >&2
    return 0
  fi
  # Only the tests start servers, each with a folder of its own.
  mkdir -p /etc/postgresql-common
  [ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
  # shellcheck disable=SC2086 # several names
  apt-get install -y --no-install-recommends $missing
}
