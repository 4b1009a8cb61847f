#!/bin/bash
# Sets up .venv: a Python that the server's stubs can embed, the pinned dependencies, the command line. Run by `make env`.
#   PYTHON=...              the interpreter to use (3.11 or 3.12)
#   TRIREME_SYSTEM_SITE=1   keep what this machine has, torch above all: for GPU hosts that bring their own build
set -euo pipefail
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then apt-get install -y -q "$1" >&2 || { apt-get update -q >&2 && apt-get install -y -q "$1" >&2; }
            else echo "trireme: $1 is missing (fix: sudo apt-get install $1)" >&2; exit 2; fi; }

python=
for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
  if fits "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || { echo "trireme: no Python 3.11 or 3.12 found (fix: apt-get install python3.11 python3.11-venv, or set PYTHON)" >&2; exit 2; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

constraints=constraints.txt
if [ ! -x .venv/bin/pip ]; then
  "$python" -c 'import ensurepip' 2>/dev/null || as_root "python$version-venv"
  "$python" -m venv ${TRIREME_SYSTEM_SITE:+--system-site-packages} .venv
fi
if [ -n "${TRIREME_SYSTEM_SITE:-}" ]; then
  constraints=.venv/constraints.txt
  { grep -v '^torch==' constraints.txt; .venv/bin/python -c 'import torch; print(f"torch=={torch.__version__}")'; } > $constraints
fi

echo "setting up .venv with Python $version (a minute or two the first time)"
# compiled where it is imported first: most of it never is (30 s less of a core)
.venv/bin/pip install --no-compile --disable-pip-version-check -c $constraints -e '.[server,demo,dev]' 2> >(grep -v 'is ignored: it is neither' >&2) |
  { grep --line-buffered -E '^(Collecting|Installing|Successfully)' || true; } | cut -c1-110
# the stub of the server's wheel is linked to libpython, which python.org's and Debian's interpreters do not need themselves
missing=$(.venv/bin/python -c 'from trireme_tools.server_home import find_server, missing_library; print(missing_library(find_server()) or "")')
if [ -n "$missing" ]; then as_root "${missing%%.so*}"; fi
touch .venv/.ready
echo "ready: .venv/bin/trireme"
