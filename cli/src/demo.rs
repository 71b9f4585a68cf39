//! The demo: generates text through a spectral cache, shows it as it comes, and ends with a report.
//!
//! Owns how llama.cpp is called for it. Must not judge the counters: that is `report`'s affair.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{bail, Context, Result};

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::layout::Layout;
use super::report::{self, Recall, Report};
use super::texts::{self, Kind, Text};
use super::{cmd, fsutil, model, toolchain};

const TOOL: &str = "llama-completion";
const COUNTERS: &str = "counters.jsonl";

/// The real model of the demo.
const MODEL: &str = "smollm2";
/// Bytes of a real text: several thousand tokens.
const BYTES: usize = 24_000;
/// A fact that is planted in it, and said again at its end up to the code, which the model has to know.
const FACT: &str = "The secret code for Silver river is";
const CODE: &str = "48217";

/// What to run.
pub struct Demo {
    /// How many times smaller than f16.
    pub ratio: f64,
    /// Context size in tokens; by default what a model with a name was trained for, else 32768.
    pub ctx: Option<u32>,
    /// Tokens to generate.
    pub tokens: u32,
    /// The model, or its name; SmolLM2 if not given.
    pub model: Option<PathBuf>,
    /// The text to continue; by default a real one for a model with a name, else the one in `tests/data`.
    pub prompt: Option<PathBuf>,
    /// Threads of llama.cpp.
    pub threads: usize,
    /// Where llama.cpp comes from.
    pub source: SourceKind,
    /// How many compilers at once.
    pub jobs: Option<u32>,
}

/// Which model is run.
struct Subject {
    file: PathBuf,
    /// What it is, for people.
    name: String,
    /// Tokens that it was trained for, if it is one with a name.
    trained: Option<u32>,
}

/// Builds, runs and reports. The exit code is a failure if the counters do not prove the decode path.
pub fn run(demo: &Demo) -> Result<ExitCode> {
    let layout = Layout::find()?;
    let subject = subject(demo, &layout)?;
    let request = Request { tree: Tree::Patched, targets: vec![TOOL], source: demo.source, jobs: demo.jobs };
    let bin = build::ensure(&request)?;
    let (text, source) = text(demo, &layout, &subject)?;
    let ctx = demo.ctx.or(subject.trained).unwrap_or(32768);

    let scratch = layout.work.join(format!("demo-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    fs::write(scratch.join("prompt.txt"), &text).with_context(|| format!("cannot write the prompt to {}", scratch.display()))?;
    eprintln!("the text is {source}: {} bytes", text.len());
    let generated = generate(demo, &bin.join(TOOL), &subject.file, ctx, &scratch)?;

    let counters = scratch.join(COUNTERS);
    let lines = fs::read_to_string(&counters)
        .with_context(|| format!("llama.cpp wrote no counters to {}: its KV cache was not a spectral one", counters.display()))?;
    let recall = Recall::find(&text, &generated);
    let report = Report::new(&report::read(&lines)?, demo.ratio, ctx, demo.tokens, recall)?;
    print!("\n\nmodel  {}\ntext   {source}\n\n{report}", subject.name);
    if report.faults.is_empty() {
        fsutil::remove_dir(&scratch)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("  The counters and llama.cpp's log are in {}", scratch.display());
    Ok(ExitCode::FAILURE)
}

/// The model that was asked for; by default the real one, or the small one of the repository where pip cannot fetch it.
fn subject(demo: &Demo, layout: &Layout) -> Result<Subject> {
    let given = demo.model.clone().unwrap_or_else(|| MODEL.into());
    let Some(known) = model::find(given.as_os_str())?.filter(|_| !given.is_file()) else {
        return Ok(Subject { file: model::resolve(&given)?, name: given.display().to_string(), trained: None });
    };
    match known.fetch(layout) {
        Ok(file) => Ok(Subject { file, name: known.description, trained: Some(known.context) }),
        Err(e) if demo.model.is_none() && e.is::<toolchain::Unreachable>() => {
            eprintln!("{e:#}\nthe demo goes on with the small model in tests/models");
            let name = format!("the small one in tests/models, as {MODEL} could not be fetched");
            Ok(Subject { file: layout.root.join("tests/models/bench-a-f16.gguf"), name, trained: None })
        }
        Err(e) => Err(e),
    }
}

/// The text to continue, and what it is.
fn text(demo: &Demo, layout: &Layout, subject: &Subject) -> Result<(String, String)> {
    if demo.prompt.is_none() && subject.trained.is_some() {
        let Text { body, source, .. } = texts::read(layout, Kind::Prose)?;
        return Ok((plant(texts::beginning(&body, BYTES)), format!("the beginning of {source}, with a planted fact")));
    }
    let file = demo.prompt.clone().unwrap_or_else(|| layout.root.join("tests/data/prompt.txt"));
    let file = texts::resolve(&file)?;
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read the prompt {}", file.display()))?;
    Ok((text, file.display().to_string()))
}

/// Plants the fact behind the first third, and begins to say it again at the end.
fn plant(text: &str) -> String {
    let (before, after) = text.split_at(texts::beginning(text, text.len() / 3).len());
    format!("{before}{FACT} {CODE}.\n{after}{FACT}")
}

/// Runs llama.cpp, passes on its text as it comes, and returns it.
fn generate(demo: &Demo, tool: &Path, model: &Path, ctx: u32, scratch: &Path) -> Result<String> {
    let log = scratch.join("llama.log");
    let mut llama = Command::new(tool);
    llama.arg("-m").arg(model).arg("-f").arg(scratch.join("prompt.txt"));
    llama.args(["--kv-spectral", &demo.ratio.to_string(), "-c", &ctx.to_string(), "-n", &demo.tokens.to_string(), "-t", &demo.threads.to_string()]);
    // Plain continuation of the prompt to the last token, and the same text in each run. The penalty
    // spans only the end of the text: so small a model would repeat itself without it.
    llama.args(["-no-cnv", "--no-display-prompt", "--simple-io", "--no-warmup", "--ignore-eos"]);
    llama.args(["--temp", "0", "--repeat-penalty", "1.3", "--repeat-last-n", "128"]);
    llama.env("LLAMA_KV_SPECTRAL_LOG", scratch.join(COUNTERS));
    let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    eprintln!("{}\n", cmd::shown(&llama));

    let spawned = llama.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file).spawn();
    let mut child = spawned.with_context(|| format!("cannot run `{}`", cmd::shown(&llama)))?;
    let mut text = vec![];
    if let Some(mut from) = child.stdout.take() {
        let mut piece = [0; 4096];
        loop {
            let n = from.read(&mut piece).context("cannot read what llama.cpp writes")?;
            if n == 0 {
                break;
            }
            text.extend_from_slice(&piece[..n]);
            io::stdout().write_all(&piece[..n]).and_then(|()| io::stdout().flush()).context("cannot write the text")?;
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for {TOOL}"))?;
    if !status.success() {
        let end = fs::read(&log).unwrap_or_default();
        bail!("`{}` failed ({status}); the end of {}:\n{}", cmd::shown(&llama), log.display(), cmd::tail(&String::from_utf8_lossy(&end), 40));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_planted_fact_is_one_that_the_report_asks_for() {
        let text = plant("one\ntwo\nthree\nfour\n");
        assert_eq!(text, "one\nThe secret code for Silver river is 48217.\ntwo\nthree\nfour\nThe secret code for Silver river is");
        assert_eq!(Recall::find(&text, " 48217.").unwrap().expected, CODE);
    }
}
