#!/bin/sh
# Create a virtual environment and install the toolkit's requirements into it. Does nothing if they are up to date.
#
#   sh scripts/setup_env.sh [VENV] [REQUIREMENTS] [CONSTRAINTS]
#
# The defaults are .venv, requirements_finetune.txt and constraints.txt of this checkout; other paths are relative to
# the current folder. PYTHON=/path/to/python selects the interpreter; the default is the first one from 3.10 on.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${1:-$root/.venv}
requirements=${2:-$root/requirements_finetune.txt}
constraints=${3:-$root/constraints.txt}

# One line without control characters, which a name may contain.
fail() {
    printf "setup_env.sh: error: %s" "$*" | LC_ALL=C tr "[:cntrl:]" "?" >&2
    echo >&2
    exit 2
}

[ $# -le 3 ] || fail "unexpected argument '$4'. Usage: sh scripts/setup_env.sh [VENV] [REQUIREMENTS] [CONSTRAINTS]"
for file in "$requirements" "$constraints"; do
    [ -f "$file" ] || fail "file $file does not exist"
done

# Run the interpreter, because a name on PATH proves little: version managers leave shims for versions that are not
# installed, and Debian packages venv separately.
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

# Print a requirements file and the files it includes with -r.
requirements_text() {
    cat "$1"
    sed -n 's/^-r *//p' "$1" | while read -r included; do
        requirements_text "$(dirname -- "$1")/$included"
    done
}

# Holds a line "CONSTRAINTS REQUIREMENTS" (checksums) for each set that was installed completely.
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
    # Clear only a virtual environment or an empty folder: the user may have named any folder.
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv is neither empty nor a virtual environment. Use another folder"
    fi
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# Until the last line this set counts as not installed, as does every set with other constraints.
if [ -f "$stamp" ]; then
    grep "^$pins " "$stamp" | grep -vxF "$wanted" >"$stamp.new" || true
    mv "$stamp.new" "$stamp"
fi
echo "Installing $requirements into $venv"
"$venv/bin/python" -m pip install --disable-pip-version-check -r "$requirements" -c "$constraints"
echo "$wanted" >>"$stamp"
