#!/usr/bin/env bash
# Makes the environment of the demo if it is not there and runs the tests: CPU, offline, under ten
# minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source sbatch/env.sh
export OMP_NUM_THREADS=1                                    # two test files run side by side
exec python -m pytest tests -q -n 2 --dist loadfile --durations=8 "$@"
