#!/usr/bin/env bash
# Make or reuse the environment .venv, and print the path of its Python (all else goes to stderr):
#     PYTHON=$(bash scripts/env.sh)            what requirements.txt names
#     PYTHON=$(bash scripts/env.sh --test)     and what only the tests need (requirements-test.txt)
# MASKDIT_PYTHON=/path/to/python uses that interpreter as it is, for instance in a container.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

say() { echo "env: $*" >&2; }

# Python 3.11 or newer that can make environments. Each candidate is run: a name on the PATH may be an empty shim.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no Python 3.11 or newer with venv was found (python3 is: $(python3 --version 2>&1 || true))"
    say "install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or set MASKDIT_PYTHON to an interpreter"
    return 1
}

venv_works() {
    "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# What is installed is right while the requirements and the interpreter are those of the stamp.
wanted_stamp() {
    "$venv/bin/python" -c 'import hashlib, sys; print(sys.version, hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

# install FILE STAMP [pip options]: does nothing if STAMP says that it is done. A killed install leaves no stamp and is done again.
install() {
    local requirements=$1 stamp=$venv/$2
    shift 2
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$(wanted_stamp "$requirements")" ]; then
        return
    fi
    rm -f "$stamp"
    say "installing $(basename "$requirements") into .venv; with torch this takes some minutes and about 6 GB"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" -r "$requirements" </dev/null >&2
    wanted_stamp "$requirements" >"$stamp"
}

if [ -n "${MASKDIT_PYTHON:-}" ]; then
    say "using MASKDIT_PYTHON=$MASKDIT_PYTHON as it is"
    echo "$MASKDIT_PYTHON"
    exit
fi

if ! venv_works; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" >&2
fi
install "$root/requirements.txt" stamp
if [ "${1:-}" = --test ]; then
    install "$root/requirements-test.txt" stamp-test --no-deps
fi
say ".venv is up to date ($("$venv/bin/python" --version))"
echo "$venv/bin/python"
