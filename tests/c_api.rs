//! The C interface from C and C++: the programs in `tests/c` and `examples`, built with sanitizers against the static library.

#[path = "common/programs.rs"]
mod programs;

use programs::{build, compiler, library, lines, root, scratch, succeed, LIBRARIES};
use std::process::{Command, Output};

/// Build and run a program, and give what it printed.
fn run(source: &str) -> Output {
    let program = build(source, |c| c.arg(library()).args(LIBRARIES));
    // A failed allocation is one of the cases; the library answers it, the sanitizer must not.
    let options = "allocator_may_return_null=1:detect_stack_use_after_return=1";
    succeed(Command::new(&program).env("ASAN_OPTIONS", options).env("UBSAN_OPTIONS", "print_stacktrace=1"))
}

const HEADERS: [&str; 3] = ["spectral_kv.h", "spectral_kv_llama.h", "spectral_kv_cuda.h"];

/// Names and parameters of all functions in the headers.
fn declarations() -> Vec<(String, usize)> {
    let read = |name| std::fs::read_to_string(root().join("include").join(name)).expect("the header");
    let headers = HEADERS.map(read).concat();
    // Without comments, whose lines all begin with a star or a slash, and preprocessor lines.
    let code: String = headers.lines().filter(|l| !l.trim_start().starts_with(['*', '/', '#'])).collect::<Vec<_>>().join(" ");
    let calls = code.split([';', '}']).filter_map(|statement| statement.split_once('('));
    let name = |before: &str| before.rsplit([' ', '*']).next().unwrap_or_default().to_owned();
    let all = calls.map(|(before, parameters)| (name(before), parameters.matches(',').count() + 1));
    all.filter(|(name, _)| name.starts_with("skv_")).collect()
}

fn declared() -> Vec<String> {
    declarations().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn each_header_compiles_alone_and_twice_in_c_and_cpp() {
    for (source, flag) in [("header.c", "c"), ("header.cpp", "c++")] {
        let path = scratch(source);
        for (header, times) in HEADERS.into_iter().flat_map(|h| [(h, 1), (h, 2)]) {
            let text = format!("#include \"{header}\"\n").repeat(times) + "extern int not_empty;\n";
            std::fs::write(&path, text).expect("the scratch directory is writable");
            succeed(compiler(source).args(["-x", flag, "-fsyntax-only"]).arg(&path));
        }
    }
}

#[test]
fn no_function_has_more_than_seven_parameters() {
    let long: Vec<_> = declarations().into_iter().filter(|(_, n)| *n > 7).collect();
    assert!(long.is_empty(), "{long:?}");
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
fn the_example_of_the_header_runs() {
    let out = run("examples/minimal.c");
    let text = String::from_utf8_lossy(&out.stdout);
    // Values are spread evenly from 0 to 1, and so are the weights of rows, nearly.
    let mean = text.rsplit(' ').next().and_then(|x| x.trim().parse::<f64>().ok());
    assert!(mean.is_some_and(|x| (0.4..0.6).contains(&x)), "{text}");
}

#[test]
fn smoke() {
    run("tests/c/smoke.c");
}

#[test]
fn truncate() {
    run("tests/c/truncate.c");
}

#[test]
fn null() {
    run("tests/c/null.c");
}

#[test]
fn errors() {
    run("tests/c/errors.c");
}

#[test]
fn arena() {
    run("tests/c/arena.c");
}

#[test]
fn state() {
    run("tests/c/state.c");
}

#[test]
fn cuda() {
    run("tests/c/cuda.c");
}

#[test]
fn cpp() {
    run("tests/c/cpp.cpp");
}
