#!/usr/bin/env bash
# Style, types, tests. Arguments go to pytest, paths are relative to the repository:  bash test.sh tests/test_plots.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="$(bash setup.sh --dev)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two test processes share the cores
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy ./*.py annotation benchmarks dataset_utils networks selfsupervised
exec "$python" -m pytest -n 2 "$@"
