//! With the feature `cuda`: compiles the kernels, each source for all architectures in one image that the library embeds. Without it: nothing.
//!
//! Must not know what the kernels are for, nor look at anything of CUDA unless asked.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where nvcc may be, before PATH: the compiler itself, and folders that have it in `bin`.
const NVCC: &str = "SPECTRAL_KV_NVCC";
const TOOLKITS: [&str; 2] = ["CUDA_PATH", "CUDA_HOME"];
/// Compiled for these, as far as nvcc knows them. The first is needed; any other is only faster to load than what the driver makes of PTX.
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90", "100", "120"];
/// What is compiled, in `kernels`.
const SOURCES: [&str; 2] = ["attend", "store"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=kernels");
    for variable in TOOLKITS.into_iter().chain([NVCC]) {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if let Err(why) = compile() {
        eprintln!("{why}");
        std::process::exit(1);
    }
}

/// Makes `NAME.fatbin` of each source, and `NAME.ptxas.txt` with what the assembler says of registers and spills.
fn compile() -> Result<(), String> {
    let (nvcc, out) = (find()?, PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?));
    let targets = targets(&known(&nvcc)?)?;
    for name in SOURCES {
        let mut command = Command::new(&nvcc);
        command.args(["--fatbin", "-std=c++17", "-O3", "-Xptxas", "-v"]).args(&targets).arg(format!("kernels/{name}.cu"));
        let (said, _) = run(command.arg("-o").arg(out.join(format!("{name}.fatbin"))))?;
        std::fs::write(out.join(format!("{name}.ptxas.txt")), said).map_err(|e| format!("cannot write to {}: {e}", out.display()))?;
    }
    Ok(())
}

/// The compiler that the user named, that of a toolkit, or that on PATH.
fn find() -> Result<PathBuf, String> {
    let named = |variable| env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = named(NVCC) {
        return if nvcc.is_file() { Ok(nvcc) } else { Err(format!("{NVCC}={}: there is no such file", nvcc.display())) };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = TOOLKITS.into_iter().filter_map(named).map(|toolkit| toolkit.join("bin")).chain(env::split_paths(&path));
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    folders.map(|folder| folder.join(&name)).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        format!(
            "the feature `cuda` needs nvcc, which is neither in CUDA_PATH or CUDA_HOME nor on PATH: install the CUDA toolkit, or run \
             `cargo run --release -- nvcc`, which fetches the compiler and prints its path, and set {NVCC} to it"
        )
    })
}

/// The architectures that a compiler knows, of those that are wanted.
fn known(nvcc: &Path) -> Result<Vec<&'static str>, String> {
    let (_, list) = run(Command::new(nvcc).arg("--list-gpu-code"))?;
    let is_known = |architecture: &str| list.lines().any(|line| line.trim() == format!("sm_{architecture}"));
    let (known, unknown): (Vec<_>, Vec<_>) = ARCHITECTURES.into_iter().partition(|a| is_known(a));
    if !unknown.is_empty() {
        println!("cargo:warning={} does not know sm_{}: there the driver compiles the kernels", nvcc.display(), unknown.join(", sm_"));
    }
    Ok(known)
}

/// What nvcc is told to make: code for each architecture, and PTX of the first and of the newest for those that are not here.
fn targets(architectures: &[&str]) -> Result<Vec<String>, String> {
    if architectures.first() != ARCHITECTURES.first() {
        return Err(format!("this nvcc cannot compile for sm_{}", ARCHITECTURES[0]));
    }
    let target = |architecture: &&str| {
        let has_ptx = architectures.first() == Some(architecture) || architectures.last() == Some(architecture);
        let ptx = if has_ptx { format!(",compute_{architecture}") } else { String::new() };
        format!("-gencode=arch=compute_{architecture},code=[sm_{architecture}{ptx}]")
    };
    Ok(architectures.iter().map(target).collect())
}

/// Standard error and standard output of a command that succeeded.
fn run(command: &mut Command) -> Result<(String, String), String> {
    let out = command.output().map_err(|e| format!("cannot run {command:?}: {e}"))?;
    let [said, printed] = [&out.stderr, &out.stdout].map(|text| String::from_utf8_lossy(text).into_owned());
    if !out.status.success() {
        return Err(format!("{command:?} failed ({}):\n{said}{printed}", out.status));
    }
    Ok((said, printed))
}
