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
use super::{cmd, fsutil};

const TOOL: &str = "llama-completion";

/// What to run.
pub struct Demo {
    /// How many times smaller than f16.
    pub ratio: f64,
    /// Context size in tokens.
    pub ctx: u32,
    /// Tokens to generate.
    pub tokens: u32,
    /// The model; the one in `tests/models` if not given.
    pub model: Option<PathBuf>,
    /// The text to continue; the one in `tests/data` if not given.
    pub prompt: Option<PathBuf>,
    /// Where llama.cpp comes from.
    pub source: SourceKind,
    /// How many compilers at once.
    pub jobs: Option<u32>,
}

/// Builds, runs and reports. The exit code is a failure if the counters do not prove the decode path.
pub fn run(demo: &Demo) -> Result<ExitCode> {
    let layout = Layout::find()?;
    let model = demo.model.clone().unwrap_or_else(|| layout.root.join("tests/models/bench-a-f16.gguf"));
    if !model.is_file() {
        bail!("there is no model {}: name one with --model FILE", model.display());
    }
    let prompt = demo.prompt.clone().unwrap_or_else(|| layout.root.join("tests/data/prompt.txt"));
    let text = fs::read_to_string(&prompt).with_context(|| format!("cannot read the prompt {}", prompt.display()))?;
    let request = Request { tree: Tree::Patched, targets: vec![TOOL], source: demo.source, jobs: demo.jobs };
    let bin = build::ensure(&request)?;

    let scratch = layout.work.join(format!("demo-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let counters = scratch.join("counters.jsonl");
    let generated = generate(demo, &bin.join(TOOL), &model, &prompt, &counters, &scratch.join("llama.log"))?;

    let lines = fs::read_to_string(&counters)
        .with_context(|| format!("llama.cpp wrote no counters to {}: its KV cache was not a spectral one", counters.display()))?;
    let recall = Recall::find(&text, &generated);
    let report = Report::new(&report::read(&lines)?, demo.ratio, demo.ctx, demo.tokens, recall)?;
    print!("\n\n{report}");
    if report.faults.is_empty() {
        fsutil::remove_dir(&scratch)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("  The counters and llama.cpp's log are in {}", scratch.display());
    Ok(ExitCode::FAILURE)
}

/// Runs llama.cpp, passes on its text as it comes, and returns it.
fn generate(demo: &Demo, tool: &Path, model: &Path, prompt: &Path, counters: &Path, log: &Path) -> Result<String> {
    let mut llama = Command::new(tool);
    llama.arg("-m").arg(model).arg("-f").arg(prompt);
    llama.args(["--kv-spectral", &demo.ratio.to_string(), "-c", &demo.ctx.to_string(), "-n", &demo.tokens.to_string()]);
    // Plain continuation of the prompt to the last token, and the same text in each run. The penalty
    // spans only the end of the text: so small a model would repeat itself without it.
    llama.args(["-no-cnv", "--no-display-prompt", "--simple-io", "--no-warmup", "--ignore-eos"]);
    llama.args(["--temp", "0", "--repeat-penalty", "1.3", "--repeat-last-n", "128"]);
    llama.env("LLAMA_KV_SPECTRAL_LOG", counters);
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
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
        let end = fs::read(log).unwrap_or_default();
        bail!("`{}` failed ({status}); the end of {}:\n{}", cmd::shown(&llama), log.display(), cmd::tail(&String::from_utf8_lossy(&end), 40));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
