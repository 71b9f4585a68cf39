//! The program that carries out attention calls: `tests/cuda/attend.cpp`, on the host shim. Knows its arguments and nothing of calls.

use crate::{programs, shim};
use programs::{scratch, succeed};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const SOURCE: &str = "tests/cuda/attend.cpp";

/// Under sanitizers.
pub fn sanitized() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| shim::build(SOURCE))
}

/// With an eye on races in shared memory.
pub fn watched() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| shim::build_watched(SOURCE))
}

/// Outputs of calls that stand in files.
pub fn run(program: &Path, name: &str, calls: &[&[u8]]) -> Vec<Vec<f32>> {
    let file = |i: usize, kind: &str| scratch(&format!("{name}.{i}.{kind}"));
    let files: Vec<[PathBuf; 2]> = (0..calls.len()).map(|i| [file(i, "call"), file(i, "out")]).collect();
    files.iter().zip(calls).for_each(|([path, _], call)| std::fs::write(path, call).unwrap());
    succeed(Command::new(program).args(files.iter().flatten()).env("UBSAN_OPTIONS", "print_stacktrace=1"));
    let outputs = files.iter().map(|[_, path]| {
        let bytes = std::fs::read(path).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    });
    let outputs = outputs.collect();
    files.iter().flatten().for_each(|path| std::fs::remove_file(path).unwrap());
    outputs
}
