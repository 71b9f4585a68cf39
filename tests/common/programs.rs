//! Shared by the tests that build and run programs in C and C++: compilers, sanitizers, the static library. Knows no program.

#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];
const SANITIZERS: [&str; 3] = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
/// What a program links besides the static library.
pub const LIBRARIES: [&str; 4] = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn text(out: &Output) -> String {
    [&out.stdout, &out.stderr].map(|t| String::from_utf8_lossy(t).into_owned()).concat()
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Run to the end and give what it printed; a failure ends the test with it.
pub fn succeed(command: &mut Command) -> Output {
    let out = output(command);
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, text(&out));
    out
}

/// Run to the end, which must be a failure, and give all that it printed.
pub fn refuse(command: &mut Command) -> String {
    let out = output(command);
    assert!(!out.status.success(), "{command:?} succeeds\n{}", text(&out));
    text(&out)
}

pub fn lines(command: &mut Command) -> Vec<String> {
    String::from_utf8_lossy(&succeed(command).stdout).lines().map(String::from).collect()
}

/// The static library, built once in a target directory of its own: the outer cargo holds the lock of the usual one.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = scratch("c_api");
        let build = ["build", "--release", "--lib", "--offline", "--target-dir"];
        succeed(Command::new(env!("CARGO")).current_dir(root()).args(build).arg(&target).env_remove("CARGO_BUILD_TARGET"));
        target.join("release/libspectral_kv.a")
    })
}

/// The compiler for a source, strict, with the headers of the library.
pub fn compiler(source: &str) -> Command {
    let (variable, default, standard) = if source.ends_with("cpp") { ("CXX", "c++", "-std=c++17") } else { ("CC", "cc", "-std=c99") };
    let mut command = Command::new(std::env::var_os(variable).unwrap_or_else(|| default.into()));
    command.arg(standard).args(WARNINGS);
    for folder in ["include", "kernels"] {
        command.arg("-I").arg(root().join(folder));
    }
    command
}

/// A program under sanitizers, from a source and what `more` adds to the command.
pub fn build(source: &str, more: impl FnOnce(&mut Command) -> &mut Command) -> PathBuf {
    let program = scratch(&source.replace(['.', '/'], "_"));
    let mut command = compiler(source);
    command.args(SANITIZERS).arg(root().join(source)).arg("-o").arg(&program);
    succeed(more(&mut command));
    let symbols = lines(Command::new("nm").arg(&program));
    for sanitizer in ["__asan_init", "__ubsan_handle"] {
        assert!(symbols.iter().any(|s| s.contains(sanitizer)), "{source} is not sanitized: no {sanitizer}");
    }
    program
}
