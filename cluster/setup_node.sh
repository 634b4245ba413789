#!/usr/bin/env bash
# Prepares a node: the package with what it needs, the data set, and the variables of settings.sh for every
# login. It may run again: what is there stays.
#
#   setup_node.sh PACKAGE [VENV]    PACKAGE: its folder, or a wheel; VENV: made here unless it is there
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/settings.sh"
package=$1
login=". '$here/settings.sh'"

if [ $# -gt 1 ]; then
  [ -x "$2/bin/python" ] || "$PYTHON" -m venv "$2"
  source "$2/bin/activate"
  login+=" && . '$2/bin/activate'"
fi
python -m pip install --quiet --disable-pip-version-check "$package[video,dashboard]" "ray[default]==$RAY_VERSION"

if [ -n "$UCF101_SOURCE" ] && [ ! -e "$UCF101_ROOT" ]; then
  echo "copying $UCF101_SOURCE to $UCF101_ROOT"
  python - "$UCF101_SOURCE" "$UCF101_ROOT" <<'PYTHON_CODE'
import os
import sys

from pyarrow import fs

source, target = sys.argv[1:]
partial = f"{target}.partial"  # a copy that was interrupted is not taken for the data set
os.makedirs(partial, exist_ok=True)
fs.copy_files(source, partial)
os.rename(partial, target)
PYTHON_CODE
fi

touch ~/.bashrc
grep --quiet --line-regexp --fixed-strings "$login" ~/.bashrc || echo "$login" >> ~/.bashrc
