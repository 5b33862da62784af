#!/usr/bin/env bash
# Make the environment and run the tests; arguments go to pytest, as in: bash scripts/test.sh -m slow -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/env.sh --test)
exec "$PYTHON" -m pytest "$@" </dev/null
