//! CUDA kernels without a GPU: the programs in `tests/cuda`, built with the host shim and sanitizers.

#[path = "common/programs.rs"]
mod programs;

use programs::{build, compiler, refuse, root, scratch, succeed};
use std::path::PathBuf;
use std::process::{Command, Output};

const SHIM: &str = "tests/cuda/shim";

/// How a kernel, or a program with kernels, is compiled for the shim.
fn with_shim(command: &mut Command) -> &mut Command {
    command.arg("-O1").arg("-include").arg(root().join(SHIM).join("cuda_shim.h"))
}

/// The shim's own sources.
fn shim() -> Vec<PathBuf> {
    let files = std::fs::read_dir(root().join(SHIM)).expect("the shim's folder").map(|f| f.expect("a file of it").path());
    files.filter(|f| f.extension().is_some_and(|e| e == "cpp")).collect()
}

/// Build and run a program, and give what it printed.
fn run(source: &str) -> Output {
    let program = build(source, |c| with_shim(c).args(shim()));
    succeed(Command::new(program).env("UBSAN_OPTIONS", "print_stacktrace=1"))
}

#[test]
fn shim_runs_kernels_as_a_device_does() {
    let out = run("tests/cuda/shim_test.cpp");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "shim: all well\n");
}

/// The same without sanitizers, but with an eye on races in shared memory (`shim/races.h`).
fn run_watched(source: &str) -> Output {
    let program = scratch(&source.replace(['.', '/'], "_")).with_extension("watched");
    let object = program.with_extension("o");
    succeed(with_shim(&mut compiler(source)).args(["-g", "-fsanitize=thread", "-c"]).arg(root().join(source)).arg("-o").arg(&object));
    succeed(with_shim(&mut compiler(source)).args(shim()).arg(object).arg("-o").arg(&program));
    succeed(&mut Command::new(program))
}

#[test]
fn races_in_shared_memory_are_seen() {
    let out = run_watched("tests/cuda/races_test.cpp");
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
