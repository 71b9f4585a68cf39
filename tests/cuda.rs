//! CUDA kernels without a GPU: the programs in `tests/cuda`, built with the host shim and sanitizers.

#[path = "common/programs.rs"]
mod programs;
#[path = "common/shim.rs"]
mod shim;

use programs::{compiler, refuse, root, scratch, succeed};
use shim::{build, build_watched, with_shim};
use std::process::{Command, Output};

/// Build and run a program, and give what it printed.
fn run(source: &str) -> Output {
    succeed(Command::new(build(source)).env("UBSAN_OPTIONS", "print_stacktrace=1"))
}

#[test]
fn shim_runs_kernels_as_a_device_does() {
    let out = run("tests/cuda/shim_test.cpp");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "shim: all well\n");
}

#[test]
fn races_in_shared_memory_are_seen() {
    let out = succeed(&mut Command::new(build_watched("tests/cuda/races_test.cpp")));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "races: all well\n");
}

#[test]
fn shared_memory_is_dynamic_only() {
    let source = scratch("static_shared.cpp");
    std::fs::write(&source, "__global__ void kernel() { __shared__ float values[32]; values[0] = 0; }\n").expect("the scratch directory is writable");
    let words = refuse(with_shim(&mut compiler("static_shared.cpp")).arg("-fsyntax-only").arg(&source));
    assert!(words.contains("the host shim has dynamic shared memory only: SKV_SHARED"), "{words}");
}

#[test]
fn device_functions_need_nvcc_or_the_shim() {
    let source = root().join("kernels/device.cuh");
    let words = refuse(compiler("device.cpp").args(["-fsyntax-only", "-x", "c++"]).arg(source));
    assert!(words.contains("for nvcc, or for a C++ compiler with -include"), "{words}");
}
