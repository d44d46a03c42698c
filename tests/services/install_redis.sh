# Sourced by the script that installs services: redis-server and redis-cli. May run again.
install_redis() {
  command -v redis-server >/dev/null && command -v redis-cli >/dev/null && return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: redis-server redis-tools; the tests on Redis are skipped" >&2
    return 0
  fi
  # Only the tests start servers, each with a folder of its own.
  RUNLEVEL=1 apt-get install -y --no-install-recommends redis-server redis-tools
}
