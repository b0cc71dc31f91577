#!/bin/sh
# Installs commonweight from this checkout into an environment of its own. Every package must have
# a SHA-256 that deploy/locks names; pip refuses any other file.
#   sh deploy/install.sh coordinator|agent [FOLDER] [WHEEL]
# FOLDER is ~/commonweight by default. Without a WHEEL, one is built from this checkout.
set -eu
role=${1:-}
folder=${2:-$HOME/commonweight}
wheel=${3:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
case $role in
    coordinator | agent) ;;
    *) echo "usage: sh deploy/install.sh coordinator|agent [FOLDER] [WHEEL]" >&2; exit 2 ;;
esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "commonweight needs Python 3.11 or newer: PYTHON=python3.12 sh deploy/install.sh $role" >&2
    exit 2
}

install() { # install PYTHON ARGUMENTS…
    in=$1; shift
    "$in" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}

if [ -z "$wheel" ]; then
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    "$python" -m venv "$build/venv"
    install "$build/venv/bin/python" --require-hashes -r "$here/locks/build.txt"
    "$build/venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --wheel-dir "$build" "$here/.."
    wheel=$(ls "$build"/commonweight-*.whl)
fi
"$python" -m venv "$folder"
install "$folder/bin/python" --require-hashes --only-binary :all: -r "$here/locks/$role.txt"
install "$folder/bin/python" --no-deps --no-index "$wheel"
echo "installed: $folder/bin/commonweight and $folder/bin/commonweight-agent"
