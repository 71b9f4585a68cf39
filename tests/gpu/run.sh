#!/usr/bin/env bash
# Test the attention kernels on a GPU, and time them: tests/gpu/run.sh CALLS.tgz [libspectral_kv.a], with what tests/gpu/write.sh wrote, and the library with the
# feature cuda, whose C interface is tested then. Needs nvcc (on PATH, or SPECTRAL_KV_NVCC) and a GPU, and no Rust. Each call is compared with what is right,
# repeated, and replayed from a graph; some are run under compute-sanitizer, if it is there.
set -euo pipefail
archive=$(realpath "${1:?usage: tests/gpu/run.sh CALLS.tgz [libspectral_kv.a]}")
library=${2:+$(realpath "$2")}
nvcc=${SPECTRAL_KV_NVCC:-nvcc}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar xzf "$archive" -C "$work"
calls=$work/calls
"$nvcc" -std=c++17 -O3 -lineinfo -arch="${ARCH:-native}" -x cu -o "$work/attend" tests/cuda/attend.cpp

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
"$work/attend" "$calls"/*.call
programs=()
if [[ $library ]]; then
    "$nvcc" -O1 -Iinclude -Ikernels -o "$work/api" tests/gpu/api.c "$library" -lpthread -ldl -lm -lgcc_s
    "$work/api"
    programs=("$work/api")
fi

if ! type -P compute-sanitizer >/dev/null; then
    echo "accesses and races are not checked: there is no compute-sanitizer"
    exit
fi
for tool in memcheck racecheck; do
    # One of each kind: these are slow.
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$work/attend" --once "$calls"/{heads.{1,5,25},waiting.1,former.0,apart.2,exact.1,none.2,tokens.8}.call
    for program in "${programs[@]}"; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$program"
    done
done
