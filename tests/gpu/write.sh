#!/usr/bin/env bash
# Write attention calls, and what is right about them, for tests/gpu/run.sh on a machine with a GPU: tests/gpu/write.sh CALLS.tgz. Needs Rust, and no GPU.
set -euo pipefail
archive=$(realpath "${1:?usage: tests/gpu/write.sh CALLS.tgz}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SPECTRAL_KV_GPU_CALLS=$work/calls cargo test --release --test cuda_attention -- --include-ignored
tar czf "$archive" -C "$work" calls
