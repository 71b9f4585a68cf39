//! Speed: stock and patched llama.cpp side by side, on the same model, prompt lengths and threads.
//!
//! Owns the options and the order of the measurements. Must not know how llama.cpp's tools are called, nor how results are shown.

mod gguf;
mod host;
mod model;
mod parts;
mod plot;
mod report;
mod runs;
mod table;

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{ensure, Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::layout::{Layout, Pin};
use super::{cmd, model as real, text};

use host::Host;
use model::Shape;
use report::{Row, Subject, Summary, Timing};
use runs::{Cache, Case, Runs};

/// Types of a KV cache that both tools know.
const TYPES: [&str; 8] = ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"];

/// The way tokens go through a model.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// One token after the other, behind a context.
    Decode,
    /// Many tokens at once, behind a context.
    Prefill,
    /// One token of each of some sequences at once, behind a context that they share.
    Batch,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One token after the other, behind a context.
    Decode,
    /// Many tokens at once, behind a context.
    Prefill,
    /// One token of each of some sequences at once, behind a context that they share.
    Batch,
    /// What the library does between the graphs of decode steps, without llama.cpp and models.
    Host,
}

impl Part {
    /// The way through a model, if there is one.
    fn what(self) -> Option<What> {
        match self {
            Part::Decode => Some(What::Decode),
            Part::Prefill => Some(What::Prefill),
            Part::Batch => Some(What::Batch),
            Part::Host => None,
        }
    }
}

/// An instruction-set level of the library.
#[derive(Clone, Copy, ValueEnum)]
pub enum Level {
    /// AVX-512 with VNNI.
    Avx512vnni,
    /// AVX-512 alone.
    Avx512,
    /// AVX2.
    Avx2,
    /// What every CPU has.
    Portable,
}

/// Flash attention of stock caches.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fa {
    /// With it.
    On,
    /// Without it, where the type allows that: quantised values need it.
    Off,
    /// Both where the type allows it; the faster one counts.
    Best,
}

impl Fa {
    /// What is measured of a type.
    fn of(self, kind: &str) -> &'static [bool] {
        match self {
            Fa::Off if kind == "f16" => &[false],
            Fa::Best if kind == "f16" => &[true, false],
            _ => &[true],
        }
    }
}

#[derive(Clone)]
enum Model {
    Made(&'static Shape),
    File(PathBuf),
}

/// What to measure, and how.
#[derive(Args)]
pub struct Options {
    /// Models, comma-separated: attention (nearly nothing but attention), 8b (4 layers of an 8B model), a GGUF file, or the name of
    /// one (see the command `model`)
    #[arg(short, long = "model", value_name = "MODEL", value_delimiter = ',', default_value = "attention,8b", value_parser = parse_model)]
    models: Vec<Model>,
    /// What to measure, comma-separated (default: everything but host; for 8b decode)
    #[arg(long, value_enum, value_delimiter = ',')]
    what: Option<Vec<Part>>,
    /// Tokens before those that are decoded, comma-separated (default: 512,4096,16384; for 8b 0,16384)
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    depths: Option<Vec<u32>>,
    /// Decode at depth 65536 as well; to get there takes minutes for each cache
    #[arg(long)]
    long: bool,
    /// Tokens before the prefilled ones, comma-separated
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "0,8192,32768")]
    prefill_depths: Vec<u32>,
    /// Tokens that the sequences of a batch share
    #[arg(long, value_name = "TOKENS", default_value_t = 16384)]
    batch_depth: u32,
    /// Sequences of a batch: query tokens of a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: u32,
    /// Cells of the tables that host measures, comma-separated; they are filled but for the last steps
    #[arg(long, value_name = "CELLS", value_delimiter = ',', default_value = "131072,1048576", value_parser = clap::value_parser!(u32).range(1024..))]
    host_cells: Vec<u32>,
    /// Stock cache types, comma-separated (default: f16,q8_0,q4_0 to decode, f16 else and for 8b)
    #[arg(long, value_delimiter = ',', value_parser = TYPES)]
    types: Option<Vec<String>>,
    /// Flash attention of stock caches
    #[arg(long, value_enum, default_value_t = Fa::Best)]
    fa: Fa,
    /// How many times smaller than f16 the spectral cache shall be
    #[arg(long, value_name = "RATIO", default_value_t = 8.0, value_parser = crate::parse_ratio)]
    kv_spectral: f64,
    /// Tokens to decode
    #[arg(short = 'n', long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Tokens to prefill
    #[arg(short, long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Repetitions; those of decode and prefill begin with the same, once filled cache
    #[arg(short, long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// How often to fill the caches and do all repetitions, every second time in reverse order: against slow changes of the machine
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Threads of llama.cpp
    #[arg(short, long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
    /// Instruction-set level of the library (default: the best of the CPU, or SPECTRAL_KV_CPU_LEVEL)
    #[arg(long, value_enum)]
    level: Option<Level>,
    /// Write all numbers to this file, as JSON
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Draw the speed of decoding against the depth, as SVG
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn parse_model(s: &str) -> Result<Model, String> {
    match [&model::ATTENTION, &model::EIGHT_B].into_iter().find(|m| m.name == s) {
        Some(made) => Ok(Model::Made(made)),
        None if Path::new(s).is_file() || real::find(s.as_ref()).is_ok_and(|m| m.is_some()) => Ok(Model::File(s.into())),
        None => Err("expected attention, 8b, a GGUF file that is there, or a name that the command `model` knows".into()),
    }
}

/// Something's name on the command line.
fn value_name(x: &impl ValueEnum) -> String {
    x.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
}

/// Rows of one model, and the caches of each.
fn plan(o: &Options, model: &Model) -> Vec<(Case, Vec<Cache>)> {
    // Of this one the interest is what decoding is made of.
    let is_large = matches!(model, Model::Made(m) if m.name == model::EIGHT_B.name);
    let all: &[Part] = if is_large { &[Part::Decode] } else { &[Part::Decode, Part::Prefill, Part::Batch] };
    let asked = o.what.as_deref().unwrap_or(all).iter().filter_map(|part| part.what());
    let mut decode = o.depths.clone().unwrap_or_else(|| if is_large { vec![0, 16384] } else { vec![512, 4096, 16384] });
    decode.extend(o.long.then_some(65536));
    let caches = |what: What| {
        let default: &[&str] = if is_large || what != What::Decode { &["f16"] } else { &["f16", "q8_0", "q4_0"] };
        let types = o.types.clone().unwrap_or_else(|| default.iter().map(|t| t.to_string()).collect());
        let of = |kind: &String| o.fa.of(kind).iter().map(|fa| Cache::Stock { kind: kind.clone(), fa: *fa }).collect::<Vec<_>>();
        let mut caches: Vec<Vec<Cache>> = types.iter().map(of).collect();
        // Next to the first type, the one that matters most.
        caches.insert(1, vec![Cache::Spectral]);
        caches.into_iter().flatten().collect()
    };
    let rows = |what: What| {
        let (depths, tokens, sequences) = match what {
            What::Decode => (decode.clone(), o.tokens, 1),
            What::Prefill => (o.prefill_depths.clone(), o.prompt, 1),
            What::Batch => (vec![o.batch_depth], o.tokens, o.batch),
        };
        depths.into_iter().map(move |depth| (Case { what, depth, tokens, sequences }, caches(what)))
    };
    asked.flat_map(rows).collect()
}

/// Calls of a tool for one cache, and the repetitions in each. A batch is filled anew for each repetition.
fn calls(o: &Options, case: &Case) -> (u32, u32) {
    match case.what {
        What::Batch => (o.rounds * o.repetitions, 1),
        What::Decode | What::Prefill => (o.rounds, o.repetitions),
    }
}

/// Measures, prints a table, and writes the numbers.
pub fn run(o: &Options, source: SourceKind, jobs: Option<u32>) -> Result<ExitCode> {
    let can_draw = || o.models.iter().flat_map(|m| plan(o, m)).any(|(case, _)| case.what == What::Decode && case.depth > 0);
    ensure!(o.plot.is_none() || can_draw(), "a plot shows decoding behind a context: ask for a depth above 0");
    let host = measure_host(o)?;
    let layout = Layout::find()?;
    let level = o.level.map(|l| value_name(&l));
    let summary = Summary {
        version: env!("CARGO_PKG_VERSION"),
        llama_cpp: Pin::read(&layout.root)?.commit,
        cpu: cpu(),
        threads: o.threads,
        level: level.or_else(|| std::env::var("SPECTRAL_KV_CPU_LEVEL").ok()),
        kv_spectral: o.kv_spectral,
        repetitions: o.repetitions,
        rounds: o.rounds,
        models: measure_models(o, &layout, source, jobs)?,
        host,
    };
    print!("{summary}");
    let write = |path: &Path, text: String| fs::write(path, text).with_context(|| format!("cannot write {}", path.display()));
    if let Some(path) = &o.output {
        write(path, serde_json::to_string_pretty(&summary)? + "\n")?;
    }
    if let Some(path) = &o.plot {
        write(path, plot::speeds(&summary.models)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// All rows of all models, if there are any: builds what they take.
fn measure_models(o: &Options, layout: &Layout, source: SourceKind, jobs: Option<u32>) -> Result<Vec<Subject>> {
    let plans: Vec<_> = o.models.iter().map(|m| (m, plan(o, m))).filter(|(_, rows)| !rows.is_empty()).collect();
    if plans.is_empty() {
        return Ok(vec![]);
    }
    let cases = || plans.iter().flat_map(|(_, rows)| rows);
    let mut targets: Vec<&'static str> = cases().map(|(case, _)| runs::tool(case.what)).collect();
    targets.sort_unstable();
    targets.dedup();
    let build = |tree| build::ensure(&Request { tree, targets: targets.clone(), source, jobs });
    let mut runs = Runs {
        stock: build(Tree::Stock)?,
        patched: build(Tree::Patched)?,
        model: PathBuf::new(),
        threads: o.threads,
        ratio: o.kv_spectral,
        scratch: layout.work.clone(),
        level: o.level.map(|l| value_name(&l)),
    };
    let bar = progress(cases().map(|(case, caches)| u64::from(calls(o, case).0) * caches.len() as u64).sum());
    let mut models = vec![];
    for (model, rows) in &plans {
        let (name, description) = match model {
            Model::Made(shape) => {
                runs.model = shape.file(layout)?;
                (shape.name.to_string(), shape.description())
            }
            Model::File(path) => {
                runs.model = real::resolve(path)?;
                (path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(), path.display().to_string())
            }
        };
        let measured = rows.iter().map(|(case, caches)| measure(o, &runs, &bar, &name, case, caches)).collect::<Result<_>>()?;
        models.push(Subject::new(name, description, measured));
    }
    bar.finish_and_clear();
    Ok(models)
}

/// Decode steps that the library's host time is a median of.
const HOST_STEPS: u32 = 320;

fn measure_host(o: &Options) -> Result<Vec<Host>> {
    if !o.what.as_ref().is_some_and(|what| what.contains(&Part::Host)) {
        return Ok(vec![]);
    }
    o.host_cells.iter().map(|cells| host::measure(*cells, HOST_STEPS)).collect()
}

/// One row: the caches take turns.
fn measure(o: &Options, runs: &Runs, bar: &ProgressBar, name: &str, case: &Case, caches: &[Cache]) -> Result<Row> {
    let (calls, repetitions) = calls(o, case);
    let mut timings: Vec<Timing> = caches.iter().map(Timing::new).collect();
    for call in 0..calls {
        let mut order: Vec<usize> = (0..caches.len()).collect();
        if call % 2 == 1 {
            order.reverse();
        }
        for i in order {
            let what = format!("{name}, {case}, {}", caches[i]);
            bar.set_message(what.clone());
            let sample = runs.sample(case, &caches[i], repetitions).with_context(|| format!("cannot measure {what}"))?;
            let shown = sample.speeds.iter().map(|x| text::number(*x)).collect::<Vec<_>>().join(" ");
            bar.suspend(|| eprintln!("{what}: {shown} t/s"));
            bar.inc(1);
            timings[i].add(sample);
        }
    }
    Ok(Row::new(case, timings))
}

/// A bar over the calls, hidden where there is no terminal. Nothing redraws it by itself: that would be another thread.
fn progress(calls: u64) -> ProgressBar {
    let bar = ProgressBar::new(calls);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}  {wide_msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

/// The name of the CPU, on Linux and macOS.
fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = info.lines().filter_map(|l| l.split_once(':')).find(|(key, _)| key.trim() == "model name").map(|(_, name)| name.trim().to_string());
    let asked = || cmd::text(Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"])).ok();
    named.or_else(asked).unwrap_or_else(|| "unknown CPU".into())
}
