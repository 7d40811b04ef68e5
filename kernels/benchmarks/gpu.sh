#!/usr/bin/env bash
# Build the CUDA kernels for this machine's GPU, check all kernels on it, and time them: about 8 minutes on an H200.
#   bash kernels/benchmarks/gpu.sh OUT [WHEELS]
# Writes to the folder OUT. WHEELS is a folder with wheels of the peers, mamba-ssm and mambavision; without them their
# rows are skipped. Uses the interpreter in PYTHON (default: python), which needs torch, timm, einops and pytest.
set -euo pipefail
out=$(realpath -m "${1:?usage: bash kernels/benchmarks/gpu.sh OUT [WHEELS]}")
wheels=${2:+$(realpath "$2")}
python=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$out"

VISION_KERNELS_CUDA=1 "$python" -m pip install --no-deps --no-build-isolation --no-index -e . 2>&1 | tee "$out/build.log"
"$python" -m vision_kernels | tee "$out/overview.txt"

"$python" -m pytest -q tests/kernels 2>&1 | tee "$out/tests.log" || echo "some tests failed, see $out/tests.log"
small=(-m pytest -q tests/kernels -k "recorded and cuda and not emulated")
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" "${small[@]}" >"$out/$tool.log" 2>&1 ||
            echo "$tool failed, see $out/$tool.log"
    done
fi

published=()
if [[ -n $wheels ]]; then
    "$python" -m pip install -q --no-deps --no-index --find-links "$wheels" mamba-ssm causal-conv1d || true
    "$python" -m pip install -q --no-deps --no-index --find-links "$wheels" --target "$out/published" mambavision
    published=(--published "$out/published")
fi
"$python" kernels/benchmarks/gpu.py "${published[@]}" --out "$out/results.json" 2>&1 | tee "$out/results.txt"
