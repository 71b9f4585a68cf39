//! The ground-truth logger: one prompt goes through stock f16 and through a spectral cache side by side, and every token
//! tells how far the two distributions are apart.
//!
//! Owns the comparison, the choice of tokens, the log and the table on the terminal. Nothing in the log depends on time or
//! place: the same settings give the same bytes. Must not know how llama.cpp is driven: that is `probe`'s affair.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{LineWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Context as _, Result};
use serde::Serialize;

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::judge::{kl, log_softmax};
use super::law::{self, Law, Token};
use super::probe::{self, Cache, Context, ContextSpec, Keep, Probe, Tensor, Want};
use super::random::mix;
use super::text::{columns, number, or_dash, percent};

/// Candidates that are shown at the first divergence.
const TOP: usize = 5;
/// Columns that a token has on the terminal.
const WIDTH: usize = 16;

/// What to compare.
pub struct Diff {
    /// The model.
    pub model: PathBuf,
    /// The text to continue.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub tokens: usize,
    /// Context size in tokens.
    pub ctx: u32,
    /// f16 bytes per byte held.
    pub ratio: f32,
    /// Code bits per element; 0 = from the ratio.
    pub bits: f32,
    /// Most recent rows that stay exact.
    pub window: u32,
    /// A calibration to take the bases from.
    pub basis: Option<PathBuf>,
    /// Whether attention outputs are compared as well.
    pub layers: bool,
    /// Tokens of the prompt that go through the graph at once.
    pub step: u32,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Whether the first divergence is the end.
    pub stop: bool,
    /// Threads of llama.cpp.
    pub threads: usize,
    /// Where the log goes, if anywhere.
    pub log: Option<PathBuf>,
    /// Where llama.cpp comes from.
    pub source: SourceKind,
    /// How many compilers at once.
    pub jobs: Option<u32>,
}

/// Where a prompt comes from.
pub enum Prompt {
    /// A file.
    File(PathBuf),
    /// The command line.
    Text(String),
}

/// Builds, compares and reports.
pub fn run(diff: &Diff) -> Result<ExitCode> {
    if !diff.model.is_file() {
        bail!("there is no model {}", diff.model.display());
    }
    let text = match &diff.prompt {
        Prompt::File(path) => fs::read_to_string(path).with_context(|| format!("cannot read the prompt {}", path.display()))?,
        Prompt::Text(text) => text.clone(),
    };
    let request = Request { tree: Tree::Patched, targets: vec![probe::TOOL], source: diff.source, jobs: diff.jobs };
    let bin = build::ensure(&request)?;
    let mut log = Log::create(diff.log.as_deref())?;

    let mut pair = Pair::open(diff, &bin)?;
    let prompt = pair.probe.tokenize(&text, true)?;
    let end = prompt.len() + diff.tokens;
    if prompt.is_empty() {
        bail!("the prompt has no tokens");
    }
    if end > diff.ctx as usize {
        bail!("{} tokens of prompt and {} to generate do not fit a context of {}: raise -c", prompt.len(), diff.tokens, diff.ctx);
    }
    let settings = Settings::new(diff, &pair, prompt.len());
    log.write(&settings)?;
    println!("{}", settings.heading());

    let mut totals = Totals::default();
    let mut logits = pair.feed(&prompt, diff.step as usize)?;
    for position in prompt.len()..end {
        let mut step = pair.compare(&logits, position, &diff.sampler)?;
        if diff.layers {
            let seen = pair.look()?;
            step.attention_error = Some(pair.attention_errors(&seen));
            pair.seen.extend(seen);
        }
        let is_first = totals.add(&step);
        if is_first {
            step.first_divergence = Some(pair.candidates(&logits)?);
        }
        log.write(&step)?;
        println!("{}", step.line());
        if is_first {
            print!("{}", step.details());
        }
        if position + 1 == end || is_first && diff.stop {
            break;
        }
        logits = pair.feed(&[step.f16.token], 1)?;
    }
    let mut summary = totals.summary();
    summary.law = pair.law(summary.mean_kl);
    log.write(&summary)?;
    println!("\n{}", summary.text());
    if let Some(errors) = totals.mean_errors() {
        print!("\nrelative error of the attention output, mean of {} steps:\n{}", totals.steps, table(&errors));
    }
    if let Some(law) = &summary.law {
        print!("\n{}", law_table(law));
    }
    Ok(ExitCode::SUCCESS)
}

/// The two contexts, which always hold the same tokens.
struct Pair {
    probe: Probe,
    f16: Context,
    spectral: Context,
    layers: bool,
    /// All steps' layers, one after the other.
    seen: Vec<Seen>,
}

/// A layer's attention at the last token.
struct Seen {
    layer: usize,
    f16: Vec<f32>,
    spectral: Vec<f32>,
    /// The sum that f16's output goes into, and what the codes change in it; empty where that is not known.
    joined: Vec<f32>,
    errors: Vec<f32>,
}

/// What both say about the next token.
struct Logits {
    f16: Vec<f64>,
    spectral: Vec<f64>,
}

impl Pair {
    fn open(diff: &Diff, bin: &Path) -> Result<Self> {
        let mut probe = Probe::start(bin, &diff.model, diff.threads)?;
        let mut open = |cache, keep| {
            let keep = if diff.layers { keep } else { Keep::Nothing };
            probe.open(&ContextSpec { n_ctx: diff.ctx, n_ubatch: diff.step, cache, keep })
        };
        let f16 = open(Cache::Stock { k: "f16".into(), v: "f16".into(), rotate: false }, Keep::Tensors)?;
        let cache = Cache::Spectral { ratio: diff.ratio, bits: diff.bits, window: diff.window, fine: None, basis: diff.basis.clone() };
        let spectral = open(cache, Keep::ExactRows)?;
        Ok(Self { probe, f16, spectral, layers: diff.layers, seen: vec![] })
    }

    /// Appends tokens to both; returns the log-probabilities after the last one.
    fn feed(&mut self, tokens: &[i32], step: usize) -> Result<Logits> {
        let mut feed = |context, name| {
            let mut logits = vec![];
            // One call per step: a context with capture keeps the tensors of a whole call.
            let pieces = tokens.chunks(step);
            let last = pieces.len() - 1;
            for (i, piece) in pieces.enumerate() {
                let judged = (self.layers && i == last).then_some(piece.len() - 1);
                logits = self.probe.decode(context, piece, Want::Last, judged.as_slice())?;
            }
            if logits.iter().any(|l| l.is_nan()) {
                bail!("the logits of the {name} context are not numbers: its cache has failed");
            }
            Ok(log_softmax(&logits))
        };
        Ok(Logits { f16: feed(&self.f16, "f16")?, spectral: feed(&self.spectral, "spectral")? })
    }

    fn compare(&mut self, logits: &Logits, position: usize, sampler: &Sampler) -> Result<Step> {
        let (a, b) = (sampler.choose(&logits.f16, position), sampler.choose(&logits.spectral, position));
        let mut choice = |token: usize, own: &[f64], other: &[f64]| -> Result<Choice> {
            let Candidate { token: id, text, p } = candidate(&mut self.probe, token, own)?;
            Ok(Choice { token: id, text, p, rank_in_other: rank(other, token) })
        };
        Ok(Step {
            position,
            f16: choice(a, &logits.f16, &logits.spectral)?,
            spectral: choice(b, &logits.spectral, &logits.f16)?,
            same: a == b,
            // Rounding can make the sum of nearly equal ones negative.
            kl: kl(&logits.f16, &logits.spectral).max(0.0),
            first_divergence: None,
            attention_error: None,
        })
    }

    fn candidates(&mut self, logits: &Logits) -> Result<Divergence> {
        let mut named = |log_p: &[f64]| top(log_p, TOP).into_iter().map(|t| candidate(&mut self.probe, t, log_p)).collect::<Result<_>>();
        Ok(Divergence { f16: named(&logits.f16)?, spectral: named(&logits.spectral)? })
    }

    /// The attention of the last token in all layers that have one.
    fn look(&mut self) -> Result<Vec<Seen>> {
        let layers = self.probe.info().layers.clone();
        let of_layer = |(layer, l): (usize, &probe::LayerInfo)| {
            let [f16, spectral] = [&self.f16, &self.spectral]
                .map(|c| self.probe.captured(c, layer, Tensor::Attention).map(|mut a| a.split_off(a.len() - l.n_head * l.d_v)));
            let joined = self.probe.captured(&self.f16, layer, Tensor::Joined).unwrap_or_default();
            let errors = self.probe.captured(&self.spectral, layer, Tensor::Errors).unwrap_or_default();
            Ok(Seen { layer, f16: f16?, spectral: spectral?, joined, errors })
        };
        layers.iter().enumerate().filter(|(_, l)| l.n_head > 0).map(of_layer).collect()
    }

    /// Relative error of the attention output by layer and head; a layer without attention is empty.
    fn attention_errors(&self, seen: &[Seen]) -> Vec<Vec<f64>> {
        let layers = &self.probe.info().layers;
        let mut errors = vec![vec![]; layers.len()];
        for s in seen {
            let heads = |of| <[f32]>::chunks(of, layers[s.layer].d_v);
            errors[s.layer] = heads(&s.f16).zip(heads(&s.spectral)).map(|(a, b)| relative_error(a, b)).collect();
        }
        errors
    }

    /// Where the divergence of all steps comes from, if they were looked at; with a line where that cannot be told.
    fn law(&mut self, measured: f64) -> Option<Law> {
        let tokens: Vec<Token> =
            self.seen.iter().map(|s| Token { layer: s.layer, attention: &s.f16, joined: &s.joined, errors: &s.errors }).collect();
        if tokens.is_empty() {
            return None;
        }
        match law::by_layer(&mut self.probe, &self.f16, &tokens) {
            Ok(terms) => Some(Law::new(terms, Some(measured))),
            Err(e) => {
                eprintln!("where the divergence comes from cannot be told: {e:#}");
                None
            }
        }
    }
}

fn candidate(probe: &mut Probe, token: usize, log_p: &[f64]) -> Result<Candidate> {
    let id = i32::try_from(token).context("a token beyond all vocabularies")?;
    Ok(Candidate { token: id, text: probe.detokenize(&[id])?, p: log_p[token].exp() })
}

/// Chooses tokens: the likeliest one, or one at random.
pub struct Sampler {
    /// Same seed, same choices.
    pub seed: u64,
    /// 0 takes the likeliest token.
    pub temperature: f64,
}

impl Sampler {
    /// Adds to each log-probability a Gumbel number that depends on seed, position and token only, and takes the best. This
    /// samples exactly, and both contexts get the same numbers: they choose differently no more often than they must.
    fn choose(&self, log_p: &[f64], position: usize) -> usize {
        if self.temperature == 0.0 {
            return best(log_p.iter().copied());
        }
        let stream = mix(self.seed ^ mix(position as u64));
        let gumbel = |token: usize| {
            let uniform = ((mix(stream.wrapping_add(token as u64)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            -(-uniform.ln()).ln()
        };
        best(log_p.iter().enumerate().map(|(t, l)| l / self.temperature + gumbel(t)))
    }
}

/// The first of the largest.
fn best(scores: impl Iterator<Item = f64>) -> usize {
    scores.enumerate().fold((0, f64::NEG_INFINITY), |best, (i, s)| if s > best.1 { (i, s) } else { best }).0
}

/// Whether token a stands before token b: equal ones by number.
fn before(log_p: &[f64], a: usize, b: usize) -> bool {
    log_p[a] > log_p[b] || log_p[a] == log_p[b] && a < b
}

/// 1 for the likeliest token.
fn rank(log_p: &[f64], token: usize) -> usize {
    1 + (0..log_p.len()).filter(|t| before(log_p, *t, token)).count()
}

/// The likeliest tokens, in order.
fn top(log_p: &[f64], n: usize) -> Vec<usize> {
    let mut res: Vec<usize> = vec![];
    for token in 0..log_p.len() {
        let at = res.partition_point(|t| before(log_p, *t, token));
        if at < n {
            res.insert(at, token);
            res.truncate(n);
        }
    }
    res
}

fn relative_error(exact: &[f32], got: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut exact.iter().zip(got).map(|(a, b)| f64::from(a - b)));
    error / norm(&mut exact.iter().map(|a| f64::from(*a))).max(f64::MIN_POSITIVE)
}

/// The first line of the log.
#[derive(Serialize)]
struct Settings {
    model: String,
    prompt_tokens: usize,
    tokens: usize,
    ctx: u32,
    step: u32,
    ratio_asked: f32,
    bits_asked: f32,
    window: u32,
    seed: u64,
    temperature: f64,
    /// llama.cpp's attention adds up in an order that depends on it.
    threads: usize,
    bytes_f16: u64,
    bytes_spectral: u64,
    ratio: f64,
    code_bits: Option<f64>,
}

impl Settings {
    fn new(diff: &Diff, pair: &Pair, prompt_tokens: usize) -> Self {
        Self {
            model: pair.probe.info().description.clone(),
            prompt_tokens,
            tokens: diff.tokens,
            ctx: diff.ctx,
            step: diff.step,
            ratio_asked: diff.ratio,
            bits_asked: diff.bits,
            window: diff.window,
            seed: diff.sampler.seed,
            temperature: diff.sampler.temperature,
            threads: diff.threads,
            bytes_f16: pair.f16.bytes_held,
            bytes_spectral: pair.spectral.bytes_held,
            ratio: pair.spectral.ratio,
            code_bits: pair.spectral.code_bits,
        }
    }

    fn heading(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
        let bits = self.code_bits.map_or(String::new(), |b| format!(", {b:.2} code bits"));
        let choice = if self.temperature == 0.0 { "greedily".into() } else { format!("with seed {} at temperature {}", self.seed, self.temperature) };
        format!(
            "{}, {} tokens of prompt; f16 chooses {choice}\n\
             cache of {} tokens: f16 {:.1} MiB, spectral {:.1} MiB (1/{:.2}{bits}, window {})\n\n\
             position  {:<WIDTH$}       p  rank   {:<WIDTH$}       p  rank        KL\n\
             {:8}  {:<WIDTH$}       in spectral   {:<WIDTH$}            in f16",
            self.model,
            self.prompt_tokens,
            self.ctx,
            mib(self.bytes_f16),
            mib(self.bytes_spectral),
            self.ratio,
            self.window,
            "f16",
            "spectral",
            "",
            "",
            "",
        )
    }
}

/// A token and its probability.
#[derive(Serialize)]
struct Candidate {
    token: i32,
    text: String,
    p: f64,
}

/// What a context chose, and what the other one thinks of it.
#[derive(Serialize)]
struct Choice {
    token: i32,
    text: String,
    p: f64,
    rank_in_other: usize,
}

/// The likeliest tokens of both where they first choose differently.
#[derive(Serialize)]
struct Divergence {
    f16: Vec<Candidate>,
    spectral: Vec<Candidate>,
}

/// A line of the log: the token at a position, which is f16's choice.
#[derive(Serialize)]
struct Step {
    position: usize,
    f16: Choice,
    spectral: Choice,
    same: bool,
    kl: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_divergence: Option<Divergence>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attention_error: Option<Vec<Vec<f64>>>,
}

impl Step {
    fn line(&self) -> String {
        let choice = |c: &Choice| format!("{} {:>7.4} {:>5}", shown(&c.text), c.p, c.rank_in_other);
        let mark = if self.same { ' ' } else { '*' };
        format!("{:>8}  {}  {mark}{} {:>9.2e}", self.position, choice(&self.f16), choice(&self.spectral), self.kl)
    }

    /// What the terminal shows at the first divergence.
    fn details(&self) -> String {
        let mut res = String::new();
        if let Some(d) = &self.first_divergence {
            res += "          first divergence, the likeliest tokens:\n";
            for (a, b) in d.f16.iter().zip(&d.spectral) {
                let _ = writeln!(res, "          {} {:>7.4}         {} {:>7.4}", shown(&a.text), a.p, shown(&b.text), b.p);
            }
        }
        if let Some(errors) = &self.attention_error {
            res += "          relative error of the attention output:\n";
            res += &table(errors);
        }
        res
    }
}

/// A token as one word of fixed width.
fn shown(text: &str) -> String {
    let quoted = format!("{text:?}");
    let cut: String = if quoted.chars().count() > WIDTH { quoted.chars().take(WIDTH - 1).chain(['…']).collect() } else { quoted };
    format!("{cut:<WIDTH$}")
}

/// A line per layer that has heads.
fn table(errors: &[Vec<f64>]) -> String {
    let mut res = String::from("          layer     mean    worst  head\n");
    for (il, heads) in errors.iter().enumerate().filter(|(_, h)| !h.is_empty()) {
        let worst = best(heads.iter().copied());
        let mean = heads.iter().sum::<f64>() / heads.len() as f64;
        let _ = writeln!(res, "          {il:>5} {mean:>8.5} {:>8.5} {worst:>5}", heads[worst]);
    }
    res
}

/// A line per layer, the largest first.
fn law_table(law: &Law) -> String {
    let mut rows = vec![["layer", "of all", "keys", "most of it"].map(String::from).to_vec()];
    let heads = law.heads(usize::MAX);
    for (layer, share) in law.layers(usize::MAX).into_iter().filter(|(_, share)| *share > 0.0) {
        let keys = law.share(law.shares[layer].keys.iter().sum()) / share;
        let most =
            heads.iter().find(|((l, ..), _)| *l == layer).map(|((_, head, side), x)| format!("{} of KV head {head}: {}", side.name(), percent(*x)));
        rows.push(vec![layer.to_string(), percent(share), percent(keys), or_dash(most)]);
    }
    format!(
        "where the KL divergence of {} comes from, by layer ({} of it from keys; the law of the residual stream says {}):\n{}",
        number(law.measured.unwrap_or(law.says)),
        percent(law.keys()),
        number(law.says),
        columns(&rows)
    )
}

/// The last line of the log.
#[derive(Serialize)]
struct Summary {
    steps: usize,
    mean_kl: f64,
    max_kl: f64,
    max_kl_position: usize,
    agreement: f64,
    first_divergence: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    law: Option<Law>,
}

impl Summary {
    fn text(&self) -> String {
        let first = self.first_divergence.map_or("none".into(), |p| format!("at position {p}"));
        format!(
            "{} tokens: KL divergence {:.3e} on average, {:.3e} at most (position {}); same choice {:.2} %; first divergence {first}",
            self.steps,
            self.mean_kl,
            self.max_kl,
            self.max_kl_position,
            100.0 * self.agreement
        )
    }
}

/// Sums over the steps.
#[derive(Default)]
struct Totals {
    steps: usize,
    same: usize,
    kl: f64,
    max_kl: f64,
    max_kl_position: usize,
    first_divergence: Option<usize>,
    errors: Vec<Vec<f64>>,
}

impl Totals {
    /// Whether this step is the first divergence.
    fn add(&mut self, step: &Step) -> bool {
        self.steps += 1;
        self.same += usize::from(step.same);
        self.kl += step.kl;
        if self.steps == 1 || step.kl > self.max_kl {
            (self.max_kl, self.max_kl_position) = (step.kl, step.position);
        }
        if let Some(errors) = &step.attention_error {
            self.errors.resize(errors.len(), vec![]);
            for (sum, e) in self.errors.iter_mut().zip(errors) {
                sum.resize(e.len(), 0.0);
                sum.iter_mut().zip(e).for_each(|(s, e)| *s += e);
            }
        }
        let is_first = !step.same && self.first_divergence.is_none();
        if is_first {
            self.first_divergence = Some(step.position);
        }
        is_first
    }

    fn summary(&self) -> Summary {
        let n = self.steps.max(1) as f64;
        Summary {
            steps: self.steps,
            mean_kl: self.kl / n,
            max_kl: self.max_kl,
            max_kl_position: self.max_kl_position,
            agreement: self.same as f64 / n,
            first_divergence: self.first_divergence,
            law: None,
        }
    }

    /// By layer and head, if the steps had any.
    fn mean_errors(&self) -> Option<Vec<Vec<f64>>> {
        let mean = |heads: &Vec<f64>| heads.iter().map(|e| e / self.steps as f64).collect();
        (!self.errors.is_empty()).then(|| self.errors.iter().map(mean).collect())
    }
}

/// The JSON lines; nowhere if nobody asked for them.
struct Log(Option<(LineWriter<File>, PathBuf)>);

impl Log {
    fn create(path: Option<&Path>) -> Result<Self> {
        let create = |path: &Path| {
            let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            anyhow::Ok((LineWriter::new(file), path.to_path_buf()))
        };
        Ok(Self(path.map(create).transpose()?))
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let Some((file, path)) = &mut self.0 else { return Ok(()) };
        writeln!(file, "{}", serde_json::to_string(line)?).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sampler_follows_the_distribution_and_the_seed() {
        let log_p = [0.5f64, 0.3, 0.2].map(f64::ln);
        let sampler = |seed, temperature| Sampler { seed, temperature };
        let count = |s: Sampler| {
            let mut n = [0f64; 3];
            (0..20000).for_each(|position| n[s.choose(&log_p, position)] += 1.0 / 20000.0);
            n
        };
        let n = count(sampler(1, 1.0));
        assert!(n.iter().zip([0.5, 0.3, 0.2]).all(|(n, p)| (n - p).abs() < 0.015), "{n:?}");
        assert_eq!(n, count(sampler(1, 1.0)));
        assert_ne!(n, count(sampler(2, 1.0)));
        assert_eq!(count(sampler(1, 0.0)).map(f64::round), [1.0, 0.0, 0.0]);
        // Twice the temperature: square roots of the probabilities.
        let roots = [0.5f64, 0.3, 0.2].map(f64::sqrt);
        let n = count(sampler(1, 2.0));
        assert!(n.iter().zip(roots).all(|(n, r)| (n - r / roots.iter().sum::<f64>()).abs() < 0.015), "{n:?}");
    }

    #[test]
    fn ranks_and_tops_agree() {
        let log_p = log_softmax(&[1.0, 3.0, 3.0, -f32::INFINITY, 2.0]);
        assert_eq!(top(&log_p, 3), [1, 2, 4]);
        assert_eq!([0, 1, 2, 3, 4].map(|t| rank(&log_p, t)), [4, 1, 2, 5, 3]);
        assert_eq!(top(&log_p, 9).len(), 5);
    }

    #[test]
    fn divergence_of_known_distributions() {
        let log_p = log_softmax(&[0.5f32, 0.25, 0.25].map(f32::ln));
        let log_q = log_softmax(&[0.25f32, 0.25, 0.5].map(f32::ln));
        assert!((kl(&log_p, &log_q) - 0.25 * 2f64.ln()).abs() < 1e-7);
        assert_eq!(kl(&log_p, &log_p), 0.0);
        // What is impossible in p does not count.
        assert!(kl(&log_softmax(&[0.0, -f32::INFINITY]), &log_softmax(&[0.0, -f32::INFINITY])) == 0.0);
    }

    #[test]
    fn the_first_divergence_is_one() {
        let choice = |token| Choice { token, text: "a\n".into(), p: 0.5, rank_in_other: 1 };
        let step = |position, same: bool, kl| Step {
            position,
            f16: choice(1),
            spectral: choice(if same { 1 } else { 2 }),
            same,
            kl,
            first_divergence: None,
            attention_error: Some(vec![vec![0.5, 0.25], vec![]]),
        };
        let mut totals = Totals::default();
        let steps = [step(7, true, 0.5), step(8, false, 0.25), step(9, false, 0.0)];
        assert_eq!(steps.each_ref().map(|s| totals.add(s)), [false, true, false]);
        let summary = totals.summary();
        assert_eq!((summary.steps, summary.first_divergence, summary.max_kl_position), (3, Some(8), 7));
        assert_eq!((summary.mean_kl, summary.max_kl), (0.25, 0.5));
        assert_eq!(totals.mean_errors(), Some(vec![vec![0.5, 0.25], vec![]]));
        assert!(table(&totals.mean_errors().unwrap()).ends_with("          0  0.37500  0.50000     0\n"));
        assert!(steps[1].line().contains("*\"a\\n\"") && !steps[0].line().contains('*'), "{}", steps[1].line());
    }
}
