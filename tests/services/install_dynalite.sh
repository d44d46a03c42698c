# Sourced by the script that installs services: dynalite, a DynamoDB for tests, beside this file. May run again.
install_dynalite() {
  local folder
  folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/.npm"
  command -v dynalite >/dev/null && return 0
  [ -x "$folder/node_modules/.bin/dynalite" ] && return 0
  if ! command -v npm >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -y --no-install-recommends nodejs npm
  fi
  if ! command -v npm >/dev/null; then
    echo "not installed: dynalite, as there is no npm; the tests on dynalite are skipped" >&2
    return 0
  fi
  mkdir -p "$folder"
  echo '*' >"$folder/.gitignore"
  timeout 180 npm install --prefix "$folder" --no-audit --no-fund --ignore-scripts dynalite@4.0.0
}
