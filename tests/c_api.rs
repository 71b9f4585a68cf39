//! The C interface from C and C++: the programs in `tests/c`, built with sanitizers against the static library.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];
const SANITIZERS: [&str; 3] = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
const LIBRARIES: [&str; 4] = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Run to the end and give what it printed; a failure ends the test with it.
fn succeed(command: &mut Command) -> Output {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = [&out.stdout, &out.stderr].map(|t| String::from_utf8_lossy(t).into_owned()).concat();
    assert!(out.status.success(), "{command:?}: {}\n{text}", out.status);
    out
}

fn lines(command: &mut Command) -> Vec<String> {
    String::from_utf8_lossy(&succeed(command).stdout).lines().map(String::from).collect()
}

/// The static library, built once in a target directory of its own: the outer cargo holds the lock of the usual one.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = scratch("c_api");
        let build = ["build", "--release", "--lib", "--offline", "--target-dir"];
        succeed(Command::new(env!("CARGO")).current_dir(root()).args(build).arg(&target).env_remove("CARGO_BUILD_TARGET"));
        target.join("release/libspectral_kv.a")
    })
}

fn compiler(source: &str) -> Command {
    let (variable, default, standard) = if source.ends_with("cpp") { ("CXX", "c++", "-std=c++17") } else { ("CC", "cc", "-std=c99") };
    let mut command = Command::new(std::env::var_os(variable).unwrap_or_else(|| default.into()));
    command.arg(standard).args(WARNINGS).arg("-I").arg(root().join("include"));
    command
}

/// Build and run a program of `tests/c`.
fn run(source: &str) {
    let program = scratch(&source.replace('.', "_"));
    succeed(compiler(source).args(SANITIZERS).arg(root().join("tests/c").join(source)).arg("-o").arg(&program).arg(library()).args(LIBRARIES));
    let symbols = lines(Command::new("nm").arg(&program));
    for sanitizer in ["__asan_init", "__ubsan_handle"] {
        assert!(symbols.iter().any(|s| s.contains(sanitizer)), "{source} is not sanitized: no {sanitizer}");
    }
    // A failed allocation is one of the cases; the library answers it, the sanitizer must not.
    let options = "allocator_may_return_null=1:detect_stack_use_after_return=1";
    succeed(Command::new(&program).env("ASAN_OPTIONS", options).env("UBSAN_OPTIONS", "print_stacktrace=1"));
}

/// Names of all functions in the header.
fn declared() -> Vec<String> {
    let header = std::fs::read_to_string(root().join("include/spectral_kv.h")).expect("the header");
    let code: Vec<&str> = header.lines().filter(|l| !l.trim_start().starts_with(['*', '/', ' ', '#'])).collect();
    let calls = code.iter().filter_map(|l| l.split_once('(')).filter_map(|(before, _)| before.rsplit([' ', '*']).next());
    calls.filter(|name| name.starts_with("skv_")).map(String::from).collect()
}

#[test]
fn the_header_compiles_alone_and_twice_in_c_and_cpp() {
    for (source, flag) in [("header.c", "c"), ("header.cpp", "c++")] {
        let path = scratch(source);
        for times in [1, 2] {
            let text = "#include \"spectral_kv.h\"\n".repeat(times) + "extern int not_empty;\n";
            std::fs::write(&path, text).expect("the scratch directory is writable");
            succeed(compiler(source).args(["-x", flag, "-fsyntax-only"]).arg(&path));
        }
    }
}

/// Other crates and the standard library have names of their own; what this crate adds must not collide with a program's.
#[test]
fn the_library_exports_the_header_and_no_other_plain_name() {
    let symbols = lines(Command::new("nm").args(["-A", "--defined-only", "--extern-only"]).arg(library()));
    // archive:object:address type name
    let own = symbols.iter().filter(|l| l.contains(":spectral_kv-"));
    let names: Vec<&str> = own.filter_map(|l| l.rsplit(' ').next()).collect();
    let mangled = |n: &str| n.starts_with("_ZN") || n.starts_with("_R") || n.contains(".llvm.") || n == "DW.ref.rust_eh_personality";
    let plain: Vec<&str> = names.iter().copied().filter(|n| !mangled(n)).collect();
    let foreign: Vec<_> = plain.iter().filter(|n| !n.starts_with("skv_")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let declared = declared();
    assert!(declared.len() > 30, "{declared:?}");
    let missing: Vec<_> = declared.iter().filter(|n| !plain.contains(&n.as_str())).collect();
    assert!(missing.is_empty(), "declared, not defined: {missing:?}");
    let hidden: Vec<_> = plain.iter().filter(|n| !declared.iter().any(|d| d == *n)).collect();
    assert!(hidden.is_empty(), "defined, not declared: {hidden:?}");
}

#[test]
fn every_function_is_called_with_null() {
    let program = std::fs::read_to_string(root().join("tests/c/null.c")).expect("null.c");
    let missing: Vec<_> = declared().into_iter().filter(|n| !program.contains(&format!("{n}("))).collect();
    // A number, not a pointer.
    assert_eq!(missing, ["skv_status_str"]);
}

#[test]
fn smoke() {
    run("smoke.c");
}

#[test]
fn null() {
    run("null.c");
}

#[test]
fn errors() {
    run("errors.c");
}

#[test]
fn arena() {
    run("arena.c");
}

#[test]
fn state() {
    run("state.c");
}

#[test]
fn cpp() {
    run("cpp.cpp");
}
