#!/usr/bin/env bash
# Finds or makes a Python environment with what Tessera needs, and prints its interpreter. A second run installs nothing.
#   bash setup.sh          the packages of requirements.txt
#   bash setup.sh --dev    those of requirements-dev.txt too
# An active environment, or the python3 of PATH, is taken as it is when it has every package. Otherwise .venv beside this
# file is made, filled or repaired; TESSERA_VENV names another folder for it. PYTHON names the interpreter to make it with.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
files=("$root/requirements.txt")
requirements="$root/requirements.txt"
case "${1:-}" in
    "") ;;
    --dev) requirements="$root/requirements-dev.txt"; files+=("$requirements") ;;
    *) echo "setup.sh: found the argument '$1', expected --dev or nothing." >&2; exit 2 ;;
esac

# Prints the first requirement that the interpreter running it lacks. Arguments: requirement files.
read -r -d '' CHECK <<'PY' || true
import importlib.metadata, operator, re, sys
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne}

def numbers(version):
    parts = [int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
    return tuple(parts + [0] * (8 - len(parts)))

if sys.version_info < (3, 11):
    sys.exit("Python >= 3.11 (it is %d.%d)" % sys.version_info[:2])
for file in sys.argv[1:]:
    for line in open(file, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        name, ranges = re.match(r"([\w.-]+)\s*(.*)", line).groups()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(line)
        for sign, bound in re.findall(r"([<>=!]=?)\s*([\w.]+)", ranges):
            if not COMPARE[sign](numbers(found), numbers(bound)):
                sys.exit("%s (it has %s)" % (line, found))
PY

# Forgets packages whose installation was cut off, so that pip installs them again. It runs inside the environment.
read -r -d '' REPAIR <<'PY' || true
import importlib.metadata, pathlib, shutil, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
for info in site.glob("*.dist-info"):
    files = importlib.metadata.Distribution.at(info).files
    if not (info / "INSTALLER").is_file() or not files or not all(file.locate().exists() for file in files):
        print("Repairing", info.name.removesuffix(".dist-info"))
        shutil.rmtree(info)
for rest in site.glob("~*"):
    shutil.rmtree(rest)
PY

say() { echo "setup.sh: $*" >&2; }
lacks() { "$1" -c "$CHECK" "${files[@]}" 2>&1; }
runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
path_of() { "$1" -c 'import sys; print(sys.executable)'; }
interpreter() { if [ -e "$1/Scripts/python.exe" ]; then echo "$1/Scripts/python.exe"; else echo "$1/bin/python"; fi; }

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python python3.14 python3.13 python3.12 python3.11; do
        if runs "$name"; then path_of "$name"; return; fi
    done
    say "found no Python >= 3.11 (looked for python3, python, python3.11 to python3.14 in PATH)." \
        "Install one (apt install python3 python3-venv, brew install python) or name it: PYTHON=/path/to/python bash setup.sh"
    return 1
}

make_environment() { # $1: folder, $2: interpreter
    say "making the environment $1 with $2"
    local log
    if log="$("$2" -m venv --clear "$1" 2>&1)" || log="$log$("$2" -m virtualenv --clear "$1" 2>&1)"; then return; fi
    say "neither venv nor virtualenv of $2 could make $1:"
    echo "$log" >&2
    say "Install one (apt install python3-venv, or $2 -m pip install virtualenv), or name a folder that can be written" \
        "to: TESSERA_VENV=/path/to/folder. Then start again."
    return 1
}

venv="${TESSERA_VENV:-$root/.venv}"
if [ -z "${TESSERA_VENV:-}" ]; then
    for python in ${VIRTUAL_ENV:+"$(interpreter "$VIRTUAL_ENV")"} ${PYTHON:+"$PYTHON"} python3 python; do
        if missing="$(lacks "$python")"; then path_of "$python"; exit; fi
        if [ "$python" = "$(interpreter "${VIRTUAL_ENV:-$venv}")" ] && [ "${VIRTUAL_ENV:-$venv}" != "$venv" ]; then
            say "the active environment $VIRTUAL_ENV lacks $missing: it is left as it is, $venv is used"
        fi
    done
fi

if command -v flock >/dev/null; then exec 9<"$root"; flock 9; fi # one installation at a time
python="$(interpreter "$venv")"
unfinished="$venv/.unfinished"
if [ -e "$unfinished" ] || ! missing="$(lacks "$python")"; then
    if ! runs "$python"; then
        if [ -n "${TESSERA_VENV:-}" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
            say "$venv (TESSERA_VENV) holds files but no Python >= 3.11. Name an environment, or an empty or new folder."
            exit 1
        fi
        base="$(find_python)"
        make_environment "$venv" "$base"
        python="$(interpreter "$venv")"
    fi
    if [ -e "$unfinished" ]; then "$python" -c "$REPAIR" >&2; fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then "$python" -m ensurepip --upgrade >&2; fi
    say "installing into $venv, this takes minutes the first time"
    touch "$unfinished"
    if ! "$python" -m pip install --disable-pip-version-check -r "$requirements" >&2; then
        say "pip could not install $requirements, see above. Started again, it goes on from here."
        exit 1
    fi
    rm -f "$unfinished"
    if ! missing="$(lacks "$python")"; then say "after the installation $venv still lacks $missing"; exit 1; fi
fi
echo "$python"
