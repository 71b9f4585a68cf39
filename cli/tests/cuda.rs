//! The library with the feature `cuda`, from end to end without a device: the compiler is fetched, the kernels are compiled for every architecture, a
//! program that is linked with the result starts where there is no driver, and a driver that computes nothing is told what a real one would be. What the
//! kernels compute is tested elsewhere.
//!
//! Fetches nvcc with pip on the first run. Tests that need it are skipped, with a line that says so, where pip cannot fetch it.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// What is compiled, and the kernels in it.
const SOURCES: [(&str, &[&str]); 2] = [("attend", &["skv_attend_16", "skv_attend_8", "skv_combine"]), ("store", &["skv_store"])];

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Standard output and standard error.
fn said(out: &Output) -> (String, String) {
    (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// Run to the end and give what it printed; a failure ends the test with it.
fn succeed(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (stdout, stderr) = said(&out);
    assert!(out.status.success(), "{command:?}: {}\n{stderr}{stdout}", out.status);
    stdout
}

/// The CUDA compiler, or nothing where pip cannot fetch it.
fn nvcc() -> Option<PathBuf> {
    let out = Command::new(env!("CARGO_BIN_EXE_spectral-kv")).arg("nvcc").stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = said(&out);
    if stderr.contains("pip cannot fetch") {
        println!("skipped: {stderr}");
        return None;
    }
    assert!(out.status.success(), "{stderr}");
    Some(PathBuf::from(stdout.trim_end()))
}

/// The library, and the folder of what its build script made.
struct Built {
    library: PathBuf,
    out: PathBuf,
}

/// Built once, in a target directory of its own: the outer cargo holds the lock of the usual one.
fn built() -> Option<&'static Built> {
    static BUILT: OnceLock<Option<Built>> = OnceLock::new();
    BUILT.get_or_init(|| Some(build(&nvcc()?))).as_ref()
}

fn build(nvcc: &Path) -> Built {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(ROOT).args(["build", "--release", "--lib", "-p", "spectral-kv", "--features", "cuda", "--message-format=json"]);
    cargo.arg("--target-dir").arg(scratch("cuda")).env_remove("CARGO_BUILD_TARGET").env("SPECTRAL_KV_NVCC", nvcc);
    let messages: Vec<Value> = succeed(&mut cargo).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |reason: &str, what: fn(&Value) -> bool| messages.iter().find(|m| m["reason"] == reason && what(m)).expect("a message");
    let script = of("build-script-executed", |m| m["package_id"].as_str().is_some_and(|id| id.contains("spectral-kv")));
    let artifact = of("compiler-artifact", |m| m["target"]["name"] == "spectral_kv");
    let mut files = artifact["filenames"].as_array().unwrap().iter().map(|f| PathBuf::from(f.as_str().unwrap()));
    Built {
        library: files.find(|f| f.extension().is_some_and(|e| e == "a")).expect("a static library"),
        out: PathBuf::from(script["out_dir"].as_str().unwrap()),
    }
}

/// What an image of kernels has for which architecture: an image is a header, and then for each a header and its code. Of such a header the first
/// 2 bytes are 2 for machine code and 1 for PTX, 4 from byte 4 on its length, 8 from 8 on that of the code, and 4 from 28 on the architecture.
fn contents(image: &[u8]) -> BTreeSet<(u16, u32)> {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 0xba55_ed50, "an image");
    let (mut at, mut found) = (16, BTreeSet::new());
    while at < image.len() {
        found.insert((word(at) as u16, word(at + 28)));
        at += word(at + 4) as usize + word(at + 8) as usize;
    }
    found
}

#[test]
fn the_compiler_is_fetched_once() {
    let Some(first) = nvcc() else { return };
    let out = Command::new(env!("CARGO_BIN_EXE_spectral-kv")).arg("nvcc").stdin(Stdio::null()).output().unwrap();
    assert_eq!(said(&out), (format!("{}\n", first.display()), String::new()), "nothing is left to do");
    assert!(succeed(Command::new(first).arg("--version")).contains("release 13.0"));
}

#[test]
fn the_library_has_kernels_for_every_architecture() {
    let Some(built) = built() else { return };
    let library = std::fs::read(&built.library).unwrap();
    for (source, _) in SOURCES {
        let image = std::fs::read(built.out.join(format!("{source}.fatbin"))).unwrap();
        let (code, ptx) = (2, 1);
        let want = ARCHITECTURES.map(|a| (code, a)).into_iter().chain([(ptx, 80), (ptx, 120)]).collect();
        assert_eq!(contents(&image), want);
        // The image itself, not only its name.
        let middle = &image[image.len() / 2..][..4096];
        assert!(library.windows(middle.len()).any(|bytes| bytes == middle), "the library does not have the image of {source}");
    }
}

#[test]
fn no_kernel_spills_registers() {
    let Some(built) = built() else { return };
    let text: String = SOURCES.iter().map(|(source, _)| std::fs::read_to_string(built.out.join(format!("{source}.ptxas.txt"))).unwrap()).collect();
    let (mut compiled, mut spilling) = (BTreeSet::new(), Vec::new());
    for part in text.split("Compiling entry function '").skip(1) {
        let (name, rest) = part.split_once("' for 'sm_").unwrap();
        let (architecture, rest) = rest.split_once('\'').unwrap();
        let spills = rest.lines().find(|line| line.contains("spill stores")).expect("what it spills").trim();
        if !spills.ends_with(" 0 bytes spill stores, 0 bytes spill loads") {
            spilling.push(format!("{name} on sm_{architecture}: {spills}"));
        }
        compiled.insert((architecture.parse().unwrap(), name));
    }
    assert_eq!(
        compiled,
        ARCHITECTURES.into_iter().flat_map(|a| SOURCES.iter().flat_map(|(_, kernels)| *kernels).map(move |name| (a, *name))).collect()
    );
    assert!(spilling.is_empty(), "{spilling:#?}");
}

/// A C compiler with what a program of the tests includes.
fn compiler() -> Command {
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compiler.args(["-std=c99", "-Wall", "-Wextra", "-Werror"]).args(["include", "kernels"].map(|folder| format!("-I{ROOT}/{folder}")));
    compiler
}

/// A program of the tests, linked with the library.
fn program(name: &str, library: &Path) -> PathBuf {
    let program = scratch(name);
    let mut compiler = compiler();
    compiler.arg(format!("{ROOT}/tests/c/{name}.c")).arg("-o").arg(&program).arg(library);
    succeed(compiler.args(["-lpthread", "-ldl", "-lm", "-lgcc_s"]));
    program
}

#[test]
fn a_program_starts_without_a_driver_and_is_told() {
    let Some(built) = built() else { return };
    let text = succeed(&mut Command::new(program("device", &built.library)));
    match text.split_once(' ') {
        Some(("1", _)) => println!("there is a device on this machine"),
        Some(("0", why)) => assert!(why.starts_with("CUDA: ") && why.contains("driver") | why.contains("device"), "{why}"),
        _ => panic!("{text}"),
    }
}

/// What a driver that computes nothing was asked for heads of `d` elements, cut at the lines with a #.
#[cfg(target_os = "linux")]
fn asked(d: u32, settings: &[(&str, &str)]) -> Option<Vec<(String, Vec<String>)>> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = scratch("driver");
    let program = PROGRAM.get_or_init(|| {
        let program = program("launch", &built()?.library);
        std::fs::create_dir_all(&folder).unwrap();
        let driver = format!("{ROOT}/tests/c/driver.c");
        succeed(compiler().args(["-shared", "-fPIC", &driver, "-o"]).arg(folder.join("libcuda.so")));
        Some(program)
    });
    let mut command = Command::new(program.as_ref()?);
    let text = succeed(command.arg(d.to_string()).env("LD_LIBRARY_PATH", &folder).envs(settings.iter().copied()));
    let mut parts: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("# "), parts.last_mut()) {
            (Some(name), _) => parts.push((name.into(), Vec::new())),
            (None, Some((_, lines))) => lines.push(line.into()),
            (None, None) => panic!("{text}"),
        }
    }
    // Whatever happened, all that was taken is given back.
    for (take, give) in [("retain", "release"), ("enter", "leave"), ("load", "unload"), ("allocate", "free")] {
        let count = |what: &str| parts.iter().flat_map(|(_, lines)| lines).filter(|line| *line == what).count();
        let failed = settings.iter().filter(|(_, value)| *value == take).count();
        assert_eq!(count(take) - failed, count(give), "{take} and {give} in {text}");
    }
    Some(parts)
}

#[cfg(target_os = "linux")]
#[test]
fn a_call_is_two_launches_and_nothing_else() {
    let Some(parts) = asked(128, &[]) else { return };
    let names: Vec<_> = parts.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["device", "layer", "use", "attend", "refused", "attend", "refused", "free", "last error: buffer too small: 65536 needed, 65535 given"]
    );
    let lines = |i: usize| parts[i].1.iter().map(String::as_str).collect::<Vec<_>>();
    let kernels = ["load", "skv_attend_8", "skv_attend_16", "skv_combine", "load", "skv_store"];
    let limits = ["skv_attend_8 may have 231424 bytes", "skv_attend_16 may have 231424 bytes", "skv_store may have 231424 bytes"];
    assert_eq!(lines(0), [&["cuInit", "cuDeviceGet", "retain", "enter"][..], &kernels, &limits, &["leave"]].concat());
    assert_eq!(lines(1), ["enter", "allocate", "upload", "synchronize", "leave"]);
    // A layer keeps its device.
    assert_eq!(lines(2), [""; 0]);
    let one = "of 8 heads, scale 0.5: 1 tokens, 64 splits, 512 cells, partials 7000, out 8000";
    let [attend, combine] = ["skv_attend_8: grid 64 1 2, block 128 1 1, ", "skv_combine: grid 8 1 1, block 128 1 1, 0 bytes, stream 9000"];
    let got = lines(3);
    assert!(got.len() == 8 && got[1].starts_with(attend) && got[1].ends_with(" bytes, stream 9000"), "{got:?}");
    assert_eq!([&got[..1], &got[2..]].concat(), ["enter", one, "launch", combine, one, "launch", "leave"]);
    assert!(lines(5)[1].starts_with("skv_attend_16: grid 8 16 2, ") && lines(5)[4].starts_with("skv_combine: grid 512 1 1, "), "{:?}", lines(5));
    assert!(lines(5)[1].ends_with(" bytes, stream 0") && lines(4).is_empty() && lines(6).is_empty());
    assert_eq!(lines(7), ["enter", "free", "leave", "enter", "unload", "unload", "leave", "release"]);
}

#[cfg(target_os = "linux")]
#[test]
fn what_a_device_lacks_is_said_before_anything_is_launched() {
    let cases = [
        (128, ("CAPABILITY", "75"), "device 0 has compute capability 7.5; 8.0 is the least"),
        // As much as a block has on small cards.
        (1024, ("SHARED", "101376"), "bytes of shared memory in a block, and the device allows 100352"),
        (128, ("FAIL", "cuInit"), "cannot start the NVIDIA driver: no memory (OUT_OF_MEMORY)"),
        (128, ("FAIL", "retain"), "cannot use device 0: no memory"),
        (128, ("FAIL", "load"), "cannot load the kernels on device 0 (compute capability 9.0): no memory"),
        (128, ("FAIL", "skv_combine"), "cannot find the kernel skv_combine: no memory"),
        (128, ("FAIL", "allocate"), "cannot allocate the constants of a layer: no memory"),
        (128, ("FAIL", "upload"), "cannot upload the constants of a layer: no memory"),
    ];
    for (d, setting, want) in cases {
        let Some(parts) = asked(d, &[setting]) else { return };
        let (last, _) = parts.last().unwrap();
        assert!(last.starts_with("last error: CUDA: ") && last.contains(want), "{setting:?}: {last}");
        assert!(parts.iter().all(|(name, _)| name != "attend"));
    }
}

/// The build script by itself, as cargo runs it with these variables.
fn build_script(variables: &[(&str, &str)]) -> Output {
    static SCRIPT: OnceLock<PathBuf> = OnceLock::new();
    let script = SCRIPT.get_or_init(|| {
        let script = scratch("build-script");
        succeed(Command::new("rustc").args(["--edition", "2021"]).arg(format!("{ROOT}/build.rs")).arg("-o").arg(&script));
        script
    });
    Command::new(script).current_dir(ROOT).env_clear().envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn a_build_with_the_feature_and_without_a_compiler_says_what_to_do() {
    let out = said(&build_script(&[]));
    assert_eq!(out, ("cargo:rerun-if-changed=build.rs\n".into(), String::new()), "without the feature there is nothing to do");

    let asked = [("CARGO_FEATURE_CUDA", "1"), ("OUT_DIR", env!("CARGO_TARGET_TMPDIR")), ("CUDA_PATH", ""), ("CUDA_HOME", "/nowhere")];
    let out = build_script(&asked);
    let (stdout, stderr) = said(&out);
    assert!(!out.status.success() && stdout.contains("rerun-if-env-changed=SPECTRAL_KV_NVCC"), "{stdout}");
    assert!(["SPECTRAL_KV_NVCC", "CUDA_PATH", "CUDA toolkit", "-- nvcc"].iter().all(|part| stderr.contains(part)), "{stderr}");

    let out = build_script(&[&asked[..], &[("SPECTRAL_KV_NVCC", "/nowhere/nvcc")]].concat());
    assert!(!out.status.success() && said(&out).1.contains("SPECTRAL_KV_NVCC=/nowhere/nvcc"), "{out:?}");
}
