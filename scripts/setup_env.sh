#!/bin/sh
# Makes a virtual environment and installs the toolkit's requirements into it; a second run finds nothing to do.
#
#   sh scripts/setup_env.sh [VENV] [REQUIREMENTS] [CONSTRAINTS]
#
# The defaults are .venv, requirements_finetune.txt and constraints.txt of this checkout; other paths are taken from the
# current folder. PYTHON=/path/to/python names the interpreter; otherwise the first one found that is 3.10 or newer.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${1:-$root/.venv}
requirements=${2:-$root/requirements_finetune.txt}
constraints=${3:-$root/constraints.txt}

fail() {
    echo "setup_env.sh: error: $*" >&2
    exit 2
}

[ $# -le 3 ] || fail "unexpected argument '$4'. Usage: sh scripts/setup_env.sh [VENV] [REQUIREMENTS] [CONSTRAINTS]"
for file in "$requirements" "$constraints"; do
    [ -f "$file" ] || fail "there is no file $file"
done

# A name on PATH proves little (version managers leave shims for what is not installed; Debian ships venv apart): ask it.
usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.10 with the venv module"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 with the venv module was found. Install one (Debian: apt install python3-venv) or set PYTHON=/path/to/python"
}

# The text that decides what gets installed: a requirements file and the files it includes with -r.
requirements_text() {
    cat "$1"
    sed -n 's/^-r *//p' "$1" | while read -r included; do
        requirements_text "$(dirname -- "$1")/$included"
    done
}

# A line "CONSTRAINTS REQUIREMENTS" (checksums) is in this file for each set that was installed to its end.
stamp=$venv/.installed
pins=$(cksum <"$constraints" | tr ' ' '-')
wanted="$pins $(requirements_text "$requirements" | cksum | tr ' ' '-')"

works() {
    "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

if works && grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    exit 0
fi

if ! works; then
    # Only a virtual environment (or nothing) may be cleared: the folder could be anything the user named.
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv is neither empty nor a virtual environment. Name another folder"
    fi
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# From here to the last line this set counts as not installed, and so does every set of other constraints.
if [ -f "$stamp" ]; then
    grep "^$pins " "$stamp" | grep -vxF "$wanted" >"$stamp.new" || true
    mv "$stamp.new" "$stamp"
fi
echo "Installing $requirements into $venv"
"$venv/bin/python" -m pip install --disable-pip-version-check -r "$requirements" -c "$constraints"
echo "$wanted" >>"$stamp"
