#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes:
#
#     benchmarks/gpu_suite.sh FOLDER
#
# GPU tests, timings beside torch, profiles, compute-sanitizer, training end to end and top-K: the stages of
# benchmarks/gpu/suite.py, whose results go to FOLDER as soon as they are known, 8 files at most.
# Needs torch, Triton, numpy, numba, pytest, pytest-benchmark and pytest-xdist; no network. ncu and
# compute-sanitizer are used where they are there. PYTHON names another interpreter than python3.
# Exit codes: 0 all stages passed; 1 some did not; 2 no GPU here, or no FOLDER given.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_suite.sh FOLDER" >&2
    exit 2
fi
export PYTHON=${PYTHON:-python3}
folder=$(realpath -m "$1")
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_suite: no GPU on this machine ($PYTHON has no torch, or its torch sees no CUDA device):" \
        "nothing was tested or measured." >&2
    exit 2
fi
exec "$PYTHON" -m benchmarks.gpu.suite "$folder"
