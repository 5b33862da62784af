#!/usr/bin/env bash
# Make the environment and run the tests, two files at a time; arguments go to pytest, as in: bash scripts/test.sh -m slow -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/env.sh --test)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@" </dev/null
