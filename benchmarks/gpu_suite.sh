#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes:
#
#     benchmarks/gpu_suite.sh [FOLDER]
#
# the GPU tests, some of them under compute-sanitizer where it is there, and the benchmark of the training step.
# Needs torch, Triton, numpy, numba, pytest and pytest-benchmark; no network. PYTHON names another interpreter.
# The table is printed last; it and the JSON go to FOLDER (benchmarks/results).
# Exit codes: 0 done; 1 a test failed, and nothing was timed; 2 no GPU here.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

if ! "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null; then
    echo "gpu_suite: no GPU on this machine ($python has no torch, or its torch sees no CUDA device):" \
        "nothing was tested or measured." >&2
    exit 2
fi

scratch=$(mktemp -d)
generator=
trap 'if [ -n "$generator" ]; then kill "$generator" 2>/dev/null; wait "$generator" 2>/dev/null; fi; rm -rf "$scratch"' EXIT
# The large data set takes some minutes on one core: it is made while the tests and the small one use the GPU.
"$python" -m benchmarks.gpu_training_step --prepare "$scratch" &
generator=$!

echo "== GPU tests"
if ! timeout 150 "$python" -m pytest tests/gpu -p no:cacheprovider; then
    echo "gpu_suite: the GPU tests failed; nothing was timed." >&2
    exit 1
fi

echo "== compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # Without torch's caching allocator each array is an allocation of its own, with ends to run over.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest tests/gpu -p no:cacheprovider -k "test_gradients and (16 or 100)" \
            >"$scratch/$tool.txt" 2>&1
        case $? in
            0) echo "$tool: no errors" ;;
            9) tail -40 "$scratch/$tool.txt"; echo "gpu_suite: $tool found errors." >&2; exit 1 ;;
            124) echo "$tool: stopped after 30 s, no error until then" ;;
            *) echo "$tool could not run: $(tail -1 "$scratch/$tool.txt")" ;;
        esac
    done
else
    echo "not on this machine"
fi

echo "== benchmark of the training step"
mkdir -p "$results"
# What is left of 8 minutes, less the last shape and the start.
"$python" -m benchmarks.gpu_training_step --prepared "$scratch" --limit-s $((430 - SECONDS)) \
    --output "$results/gpu_training_step.json" \
    | tee "$results/gpu_training_step.md"
