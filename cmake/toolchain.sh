#!/bin/sh
# What `make` needs before anything can be installed. `toolchain.sh python` prints the Python to use;
# `toolchain.sh check` prints one line of help for the first thing that is missing, and nothing when all is there.
# cmake and ninja are not looked for: pip brings them into the virtual environment.

find_python() {
  for candidate in ${GLMX_PYTHON:-} python3 python3.11 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

python=$(find_python)
case "$1" in
  python) echo "$python" ;;
  check)
    if [ "$(uname -s)-$(uname -m)" != "Linux-x86_64" ]; then
      echo "glmx builds on Linux x86-64 only; this is $(uname -s)-$(uname -m)"
    elif [ -z "$python" ]; then
      echo "no Python 3.11 or newer found; install one: apt-get install python3 python3-venv, or set GLMX_PYTHON"
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
      echo "$python has no venv module; install it: apt-get install python3-venv"
    elif ! command -v "${CXX:-g++}" >/dev/null 2>&1; then
      echo "no C++ compiler found; install one: apt-get install g++ (version 12 or newer), or set CXX"
    fi
    ;;
esac
