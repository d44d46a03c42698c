#!/usr/bin/env bash
# Installs what the tests start, as far as this machine lets us: Debian's packages as root, dynalite with npm.
# What cannot be had is named; its tests are skipped then, but fail with CI=true.
set -u
export DEBIAN_FRONTEND=noninteractive
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

updated=""
apt-get() { # the lists first, once, and only if anything is to be installed
  [ -n "$updated" ] || command apt-get update -qq
  updated=1
  command apt-get -qq "$@"
}

for file in "$folder"/install_*.sh; do
  name="$(basename "$file" .sh)"
  # shellcheck source=/dev/null
  . "$file"
  if ! "$name" >"$log" 2>&1; then
    echo "$name failed:"
    tail -n 5 "$log"
  else
    grep "^not installed" "$log" || true
  fi
done
