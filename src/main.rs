//! `spectral-kv`: fetches, patches and builds llama.cpp with the spectral KV cache, runs its tools,
//! and shows on a small model that decoding really goes through the cache.
//!
//! This file owns the command line only. It must not know how a tree is fetched or built, nor what
//! the counters mean: see the modules in [`tool`].

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod tool;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use tool::build::{Request, Tree};
use tool::demo::Demo;
use tool::fetch::SourceKind;

/// llama.cpp with an 8x smaller KV cache: build it, run it, see it work.
#[derive(Parser)]
#[command(name = "spectral-kv", version, about)]
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
    /// "llama-" before the name. All that follows the name goes to the tool.
    #[command(subcommand_value_name = "TOOL", override_usage = "spectral-kv llama [OPTIONS] <TOOL> [ARGS]...")]
    Llama(LlamaArgs),
    /// Fetch, patch and build llama.cpp
    Build(BuildArgs),
    /// Compare KV caches with f16 on a model and texts of your own
    Eval(EvalArgs),
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
    /// Context size in tokens
    #[arg(long, default_value_t = 32768)]
    ctx: u32,
    /// Tokens to generate; at least 160, so that decoding crosses two tile boundaries
    #[arg(long, default_value_t = 192, value_parser = clap::value_parser!(u32).range(160..))]
    tokens: u32,
    /// A GGUF model (default: the small one in tests/models)
    #[arg(long)]
    model: Option<PathBuf>,
    /// A text file to continue (default: tests/data/prompt.txt)
    #[arg(long)]
    prompt: Option<PathBuf>,
    #[command(flatten)]
    from: From,
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

#[derive(Args)]
struct EvalArgs {
    #[command(flatten)]
    options: tool::eval::Options,
    #[command(flatten)]
    from: From,
}

fn parse_ratio(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(r) if r > 1.0 && r <= 64.0 => Ok(r),
        _ => Err("expected a number above 1, and at most 64".into()),
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Demo(a) => tool::demo::run(&Demo {
            ratio: a.ratio,
            ctx: a.ctx,
            tokens: a.tokens,
            model: a.model,
            prompt: a.prompt,
            source: a.from.source,
            jobs: a.from.jobs,
        }),
        Command::Llama(a) => {
            let LlamaTool::Call(words) = a.tool;
            let (tool, args) = words.split_first().context("no tool was named")?;
            let name = tool::build::tool_name(&tool.to_string_lossy())?;
            let request = Request { tree: Tree::Patched, targets: vec![name], source: a.from.source, jobs: a.from.jobs };
            tool::cmd::hand_over(&tool::build::ensure(&request)?.join(name), args)
        }
        Command::Build(a) => {
            let targets = a.targets.iter().map(|t| tool::build::tool_name(t)).collect::<anyhow::Result<_>>()?;
            let tree = if a.stock { Tree::Stock } else { Tree::Patched };
            let bin = tool::build::ensure(&Request { tree, targets, source: a.from.source, jobs: a.from.jobs })?;
            if a.print_bin_dir {
                println!("{}", bin.display());
            } else {
                eprintln!("built: {}", bin.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Eval(a) => tool::eval::run(&a.options, a.from.source, a.from.jobs),
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
