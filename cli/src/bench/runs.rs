//! One measurement: a call of llama-bench or llama-batched-bench, the speeds that it prints, and the memory that it takes.
//!
//! Owns the arguments of both tools and how their output is read. Must not know what is compared with what.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::parts::Sums;
use super::What;
use crate::cmd;

/// Names the file that a spectral cache appends its counters to.
const COUNTERS: &str = "LLAMA_KV_SPECTRAL_LOG";

/// Which KV cache.
#[derive(Clone)]
pub enum Cache {
    /// One of stock llama.cpp's types, in its stock build, with or without flash attention.
    Stock {
        /// The type.
        kind: String,
        /// Flash attention.
        fa: bool,
    },
    /// The spectral one, in the patched build.
    Spectral,
}

impl Cache {
    /// Its name in results.
    pub fn name(&self) -> &str {
        match self {
            Cache::Stock { kind, .. } => kind,
            Cache::Spectral => "spectral",
        }
    }

    /// Its flash attention, `on` or `off`. The spectral one has an attention of its own, and the option must be on.
    pub fn fa(&self) -> &'static str {
        match self {
            Cache::Stock { fa: false, .. } => "off",
            _ => "on",
        }
    }
}

impl Display for Cache {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Cache::Stock { kind, .. } => write!(f, "stock {kind}, -fa {}", self.fa()),
            Cache::Spectral => f.write_str(self.name()),
        }
    }
}

/// What is timed.
pub struct Case {
    /// The way tokens go through the model.
    pub what: What,
    /// Tokens in the cache before.
    pub depth: u32,
    /// Timed tokens of each sequence.
    pub tokens: u32,
    /// Sequences.
    pub sequences: u32,
}

impl Display for Case {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self.what {
            What::Decode => write!(f, "decode at {}", self.depth),
            What::Prefill => write!(f, "prefill of {} at {}", self.tokens, self.depth),
            What::Batch => write!(f, "{} sequences at {}", self.sequences, self.depth),
        }
    }
}

/// The tool that measures it.
pub fn tool(what: What) -> &'static str {
    match what {
        What::Decode | What::Prefill => "llama-bench",
        What::Batch => "llama-batched-bench",
    }
}

/// What all measurements of a model have in common.
pub struct Runs {
    /// Folder of the stock tools.
    pub stock: PathBuf,
    /// Folder of the patched tools.
    pub patched: PathBuf,
    /// The model.
    pub model: PathBuf,
    /// Threads.
    pub threads: u32,
    /// Of the spectral cache.
    pub ratio: f64,
    /// Folder for what is read and removed at once.
    pub scratch: PathBuf,
    /// Instruction-set level for it, if not the one that it chooses.
    pub level: Option<String>,
}

/// What a call tells.
#[derive(Default)]
pub struct Sample {
    /// Tokens per second, of each repetition. A batch has one.
    pub speeds: Vec<f64>,
    /// The most memory that the process held, in bytes.
    pub peak: Option<u64>,
    /// What the cache counted in the decoded tokens, of a spectral one that decodes.
    pub sums: Option<Sums>,
}

impl Runs {
    /// Calls the tool.
    pub fn sample(&self, case: &Case, cache: &Cache, repetitions: u32) -> Result<Sample> {
        let mut call = self.call(case, cache, repetitions);
        let log = match (case.what, cache) {
            (What::Decode, Cache::Spectral) => Some(self.scratch.join(format!("bench-{}.jsonl", std::process::id()))),
            _ => None,
        };
        call.env_remove(COUNTERS).envs(log.iter().map(|file| (COUNTERS, file)));
        let ran = cmd::text_and_memory(&mut call);
        let counted = log.as_ref().map(fs::read_to_string);
        // It was written by this call, or is not there.
        log.iter().for_each(|file| drop(fs::remove_file(file)));
        let (text, peak) = ran?;
        let speeds = match case.what {
            What::Batch => read_batch(&text),
            What::Decode | What::Prefill => read_single(&text),
        };
        let speeds = speeds.with_context(|| format!("`{}` printed no speed", cmd::shown(&call)))?;
        ensure!(speeds.len() == repetitions as usize, "`{}` printed {} speeds instead of {repetitions}", cmd::shown(&call), speeds.len());
        ensure!(speeds.iter().all(|x| x.is_finite() && *x > 0.0), "`{}` printed a speed that is none", cmd::shown(&call));
        let steps = (repetitions * case.tokens) as usize;
        let sums = counted.map(|log| Sums::read(&log.context("the cache wrote no counters")?, steps)).transpose()?;
        Ok(Sample { speeds, peak, sums })
    }

    fn call(&self, case: &Case, cache: &Cache, repetitions: u32) -> Command {
        let name = tool(case.what);
        let mut call = match cache {
            Cache::Stock { kind, .. } => {
                let mut call = Command::new(self.stock.join(name));
                call.args(["-ctk", kind, "-ctv", kind]);
                call
            }
            Cache::Spectral => {
                let mut call = Command::new(self.patched.join(name));
                call.args(["--kv-spectral", &self.ratio.to_string()]);
                call.envs(self.level.iter().map(|l| ("SPECTRAL_KV_CPU_LEVEL", l)));
                call
            }
        };
        call.arg("-m").arg(&self.model).args(["-t", &self.threads.to_string(), "-fa", cache.fa()]);
        match case.what {
            What::Batch => call.args(batch(case)).args(["-tb", &self.threads.to_string()]),
            What::Decode | What::Prefill => call.args(single(case, repetitions)),
        };
        call
    }
}

/// llama-bench fills the cache once and restores it for each further repetition.
fn single(case: &Case, repetitions: u32) -> Vec<String> {
    let (prompt, decoded) = if case.what == What::Prefill { (case.tokens, 0) } else { (0, case.tokens) };
    let words = format!("-p {prompt} -n {decoded} -d {} -r {repetitions} -o json", case.depth);
    words.split(' ').map(String::from).collect()
}

/// Tokens of a second, short prompt: llama.cpp's logger loses what it is told just before the end, so that must not be the result.
const LAST_PROMPT: u32 = 256;

/// All sequences share the prompt, and each step has one token of each of them.
fn batch(case: &Case) -> Vec<String> {
    // The tool leaves out, without a word, what does not fit into the context.
    let (depth, ctx) = (case.depth, case.depth + case.sequences * case.tokens);
    let last = depth.min(LAST_PROMPT);
    let words = format!("-c {ctx} -npp {depth},{last} -ntg {} -npl {} -pps -kvu --output-format jsonl", case.tokens, case.sequences);
    words.split(' ').map(String::from).collect()
}

fn read_single(text: &str) -> Option<Vec<f64>> {
    let tests: Value = serde_json::from_str(text).ok()?;
    tests[0]["samples_ts"].as_array()?.iter().map(Value::as_f64).collect()
}

fn read_batch(text: &str) -> Option<Vec<f64>> {
    let line = text.lines().find(|l| l.starts_with('{'))?;
    let result: Value = serde_json::from_str(line).ok()?;
    Some(vec![result["speed_tg"].as_f64()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_tools() {
        assert_eq!(read_single(r#"[{"avg_ts": 2.0, "samples_ts": [1.5, 2.5]}]"#), Some(vec![1.5, 2.5]));
        assert_eq!(read_single("[]"), None);
        let batches = "\n{\"speed_pp\": 9.0, \"speed_tg\": 7.25, \"speed\": 8.0}\n{\"speed_tg\": 99.0}\n";
        assert_eq!(read_batch(batches), Some(vec![7.25]), "the first prompt's");
        assert_eq!(read_batch("main: nothing\n"), None);
    }

    #[test]
    fn a_batch_fits_into_its_context() {
        let args = batch(&Case { what: What::Batch, depth: 1000, tokens: 16, sequences: 8 }).join(" ");
        assert!(args.starts_with("-c 1128 -npp 1000,256 -ntg 16 -npl 8 "), "{args}");
    }
}
