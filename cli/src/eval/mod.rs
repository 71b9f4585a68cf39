//! The evaluation: every setting of the KV cache against f16, with the same tokens, the same ubatches and the same judge.
//!
//! Owns the options and the order of the work. Must not know how a measure is computed or shown.

mod beginnings;
mod codec;
mod corpus;
mod curve;
mod functions;
mod html;
mod logits;
mod look;
mod material;
mod measure;
mod parts;
mod scenario;
mod session;
mod settings;
mod summary;
mod table;

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::fsutil;
use super::layout::Layout;
use super::probe::{self, Probe, Weights};
use super::{model, texts};

use material::{Material, Scenario};
use parts::Parts;
use scenario::Bench;
use session::Feed;
use settings::{Setting, DEFAULT};
use summary::{Entry, Model, PathResults, Source, Summary, Used};

/// What decides over the numbers: kept parts are of no use when one of these files has changed.
const SOURCES: [&str; 11] = [
    include_str!("codec/mod.rs"),
    include_str!("codec/blocks.rs"),
    include_str!("codec/hadamard.rs"),
    include_str!("codec/truncated.rs"),
    include_str!("codec/turbo.rs"),
    include_str!("../judge.rs"),
    include_str!("../law.rs"),
    include_str!("../random.rs"),
    include_str!("look.rs"),
    include_str!("scenario.rs"),
    include_str!("session.rs"),
];

/// How attention reads the cache.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// Few tokens at once: codes are attended to.
    Decode,
    /// 512 tokens at once: rows are rebuilt first.
    Prefill,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Decode => "decode",
            Way::Prefill => "prefill",
        }
    }
}

/// Weights wider than those in the file.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Widened {
    /// 2 bytes each.
    F16,
    /// 4 bytes each: as exact as it gets.
    F32,
}

/// What to compare, and how.
#[derive(Args)]
pub struct Options {
    /// A GGUF model, or the name of one (see the command `model`)
    #[arg(short, long)]
    model: PathBuf,
    /// A text file or text:KIND (see the command `text`), or several
    #[arg(short, long = "file", required = true, num_args = 1..)]
    files: Vec<PathBuf>,
    /// Context size that the caches are made for; the spectral one derives its code rate from it
    #[arg(short, long, default_value_t = 32768)]
    ctx: u32,
    /// Tokens of a text
    #[arg(long, default_value_t = 2048)]
    length: usize,
    /// Texts, taken from the files in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    texts: u16,
    /// Settings to compare, comma-separated: stock types (q4_0, q4_0-norot), simulated ones behind an exact window
    /// (q4_0+window, turbo3+window, prototype+window), these for a part of the cache (turbo3+window@LAYER, @k, @v, @LAYERk),
    /// spectral-RATIO, spectral-BITSb, and these with -flat: one rate for rows of all ages
    #[arg(long, value_delimiter = ',', default_value = DEFAULT, hide_default_value = true)]
    settings: Vec<Setting>,
    /// What the settings are put through, comma-separated (default: text, needles, greedy, own-words, law, and switch where there
    /// is a text for it)
    #[arg(long, value_enum, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Which paths of attention
    #[arg(long, value_enum, value_delimiter = ',', default_value = "decode,prefill")]
    paths: Vec<Way>,
    /// Tokens at once on the decode path; larger models need more than 1 to be done in time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    step: u32,
    /// Texts with planted facts, up to 12 in each
    #[arg(long, default_value_t = 4)]
    needles: u16,
    /// Recent rows that stay exact: of spectral settings, and of simulated ones
    #[arg(long, default_value_t = 128)]
    window: u16,
    /// First rows that stay exact in simulated settings; spectral ones have 4
    #[arg(long, default_value_t = 4)]
    sinks: u16,
    /// Another topic for the middle of a text: its second half is judged after the first text and after its own first half
    #[arg(long)]
    switch: Option<PathBuf>,
    /// Source code that functions are spread over
    #[arg(long)]
    code: Option<PathBuf>,
    /// Tokens of this code, functions included
    #[arg(long, default_value_t = 6000)]
    code_length: usize,
    /// Tokens of beginnings that say nothing
    #[arg(long, default_value_t = 1024)]
    beginning: usize,
    /// Tokens that are taken back, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "200,1000")]
    rewind: Vec<usize>,
    /// Widen the weights first, into a file beside the finished parts: what is multiplied with quantised weights is quantised too,
    /// and this rounding alone makes a KL divergence that hides small ones (the setting rounding+window shows how large it is)
    #[arg(long, value_enum)]
    weights: Option<Widened>,
    /// Of names, codes, places and samples
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads (default: one per core; small models are fastest with 1)
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Where eval.json, eval.html and the finished parts go (default: eval/ in cargo's target directory)
    #[arg(short, long)]
    out: Option<PathBuf>,
}

impl Options {
    /// With files in the place of names.
    pub fn resolved(mut self) -> Result<Self> {
        self.model = model::resolve(&self.model)?;
        for text in self.files.iter_mut().chain(&mut self.switch) {
            *text = texts::resolve(text)?;
        }
        Ok(self)
    }

    /// What the results are to be read with.
    fn used(&self) -> Used {
        Used {
            ctx: self.ctx,
            length: self.length,
            texts: self.texts.into(),
            needles: self.needles.into(),
            window: self.window.into(),
            sinks: self.sinks.into(),
            seed: self.seed,
            step: self.step,
            weights: self.weights.and_then(|w| w.to_possible_value()).map(|w| w.get_name().to_string()),
            threads: self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from),
        }
    }

    /// How tokens go through a cache on a path.
    fn feed(&self, way: Way) -> Feed {
        let ubatch = if way == Way::Decode { self.step } else { 512 };
        Feed { ctx: self.ctx, ubatch, window: self.window.into(), sinks: self.sinks.into() }
    }
}

/// A text file and its tokens.
struct Text {
    source: Source,
    text: String,
    tokens: Vec<i32>,
}

/// Compares, prints a table and writes the files.
pub fn run(o: &Options, source: SourceKind, jobs: Option<u32>) -> Result<ExitCode> {
    ensure!(o.length >= 256, "--length must be at least 256");
    material::scenarios(o)?;
    let settings = with_reference(&o.settings);
    let layout = Layout::find()?;
    let dir = o.out.clone().unwrap_or_else(|| layout.target.join("eval"));
    let bin = build::ensure(&Request { tree: Tree::Patched, targets: vec![probe::TOOL], source, jobs })?;
    let used = o.used();
    let sha256 = fsutil::sha256(&o.model)?;
    let weights = widened(o, &bin, &dir, &sha256)?;
    let mut probe = Probe::start(&bin, weights.as_ref().unwrap_or(&o.model), used.threads)?;
    if o.ctx as usize > probe.info().n_ctx_train {
        // Only the code rate follows from the context size; positions stay below the length of the texts.
        eprintln!(
            "note: the model was trained for {} tokens; the caches are made for {}, the texts fill {}",
            probe.info().n_ctx_train,
            o.ctx,
            o.length
        );
    }
    let common = common(&format!("{sha256} {:?}", used.weights), &bin, used.threads)?;
    let parts = Parts::open(&dir.join("parts"), &common.iter().map(Vec::as_slice).collect::<Vec<_>>())?;

    let files = o.files.iter().map(|f| read(&mut probe, f)).collect::<Result<Vec<_>>>()?;
    let mut one = |file: &Option<PathBuf>| file.as_ref().map(|f| read(&mut probe, f)).transpose();
    let (other, code) = (one(&o.switch)?, one(&o.code)?);
    let material = Material::prepare(o, &mut probe, &files, other.as_ref(), code.as_ref())?;
    let longest = material.longest();
    ensure!(o.ctx as usize >= longest, "-c must be at least {longest}, for texts of {} tokens and these scenarios", o.length);

    let (entries, paths) = measured(o, &mut probe, &parts, &settings, &material)?;
    let summary = Summary {
        version: env!("CARGO_PKG_VERSION"),
        model: Model { file: file_name(&o.model), description: probe.info().description.clone(), sha256 },
        texts: files.into_iter().chain(other).chain(code).map(|t| t.source).collect(),
        options: used,
        settings: entries,
        paths,
    };
    print!("{}", table::all(&summary));
    for (name, text) in [("eval.json", serde_json::to_string_pretty(&summary)? + "\n"), ("eval.html", html::page(&summary)?)] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// What the settings hold, and what the material shows of them on each path.
fn measured(o: &Options, probe: &mut Probe, parts: &Parts, settings: &[Setting], material: &Material) -> Result<(Vec<Entry>, Vec<PathResults>)> {
    let bar = progress(o, settings, material);
    let mut bench = Bench { probe, parts, settings, feed: o.feed(Way::Prefill), bar: &bar };
    let holdings = bench.holdings()?;
    let entries = settings.iter().zip(&holdings).map(|(s, h)| Entry {
        name: s.name.clone(),
        origin: s.origin(),
        family: s.family(),
        bytes: h.bytes,
        ratio: holdings[0].bytes / h.bytes,
        code_bits: h.code_bits,
    });
    let entries: Vec<Entry> = entries.collect();
    let mut paths = vec![];
    for way in &o.paths {
        bench.feed = o.feed(*way);
        let rows = measure::rows(&mut bench, way.name(), material, o.seed)?;
        paths.push(PathResults::of(way.name(), &entries, rows));
    }
    bar.finish_and_clear();
    Ok((entries, paths))
}

/// The file with wider weights, if these are asked for; made on the first call.
fn widened(o: &Options, bin: &Path, dir: &Path, model: &str) -> Result<Option<PathBuf>> {
    let (weights, name) = match o.weights {
        None => return Ok(None),
        Some(Widened::F16) => (Weights::F16, "f16"),
        Some(Widened::F32) => (Weights::F32, "f32"),
    };
    let path = dir.join(format!("{}-{name}.gguf", &model[..16]));
    if !path.is_file() {
        eprintln!("writing {}", path.display());
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let part = path.with_extension("part");
        probe::widen(bin, &o.model, weights, &part)?;
        fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Some(path))
}

/// f16 first, then each setting once.
fn with_reference(asked: &[Setting]) -> Vec<Setting> {
    let mut settings = vec![Setting::reference()];
    for s in asked {
        if !settings.contains(s) {
            settings.push(s.clone());
        }
    }
    settings
}

/// What all parts depend on: this program, the built llama.cpp, the model, and the threads, which can change the order of sums.
fn common(model: &str, bin: &Path, threads: usize) -> Result<Vec<Vec<u8>>> {
    let mut parts: Vec<Vec<u8>> = SOURCES.iter().map(|s| s.as_bytes().to_vec()).collect();
    parts.extend([env!("CARGO_PKG_VERSION").into(), model.into(), threads.to_string().into()]);
    for name in fsutil::files(bin, &|_| false)? {
        let shown = name.to_string_lossy();
        if shown == probe::TOOL || shown.starts_with("lib") {
            parts.push(fsutil::sha256(&bin.join(&name))?.into());
        }
    }
    Ok(parts)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn read(probe: &mut Probe, path: &Path) -> Result<Text> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))?;
    let tokens = probe.tokenize(&text, false)?;
    Ok(Text { source: Source { file: file_name(path), sha256: fsutil::sha256(path)?, tokens: tokens.len() }, text, tokens })
}

/// A bar over all tokens that go through the model, hidden where there is no terminal.
fn progress(o: &Options, settings: &[Setting], m: &Material) -> ProgressBar {
    let bar = ProgressBar::new((m.tokens() * (settings.len() + 1) * o.paths.len()) as u64);
    let style = ProgressStyle::with_template("{bar:30} {percent:>3} % {elapsed}, about {eta} left  {wide_msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}
