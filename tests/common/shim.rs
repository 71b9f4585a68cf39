//! Programs with CUDA kernels, built with the host shim (`tests/cuda/shim`). Knows no kernel.

use crate::programs::{self, compiler, root, scratch, succeed};
use std::path::PathBuf;
use std::process::Command;

const SHIM: &str = "tests/cuda/shim";

/// How a kernel, or a program with kernels, is compiled for the shim.
pub fn with_shim(command: &mut Command) -> &mut Command {
    command.arg("-O1").arg("-include").arg(root().join(SHIM).join("cuda_shim.h"))
}

/// The shim's own sources.
fn shim() -> Vec<PathBuf> {
    let files = std::fs::read_dir(root().join(SHIM)).expect("the shim's folder").map(|f| f.expect("a file of it").path());
    files.filter(|f| f.extension().is_some_and(|e| e == "cpp")).collect()
}

/// A program under sanitizers.
pub fn build(source: &str) -> PathBuf {
    programs::build(source, |c| with_shim(c).args(shim()))
}

/// The same without sanitizers, but with an eye on races in shared memory (`races.h`).
pub fn build_watched(source: &str) -> PathBuf {
    let program = scratch(&source.replace(['.', '/'], "_")).with_extension("watched");
    let object = program.with_extension("o");
    succeed(with_shim(&mut compiler(source)).args(["-g", "-fsanitize=thread", "-c"]).arg(root().join(source)).arg("-o").arg(&object));
    succeed(with_shim(&mut compiler(source)).args(shim()).arg(object).arg("-o").arg(&program));
    program
}
