//! Reads the counters that the patched llama.cpp wrote, decides whether they prove that decoding went
//! through the cache, and words the report.
//!
//! The counters are judged here and nowhere else: a report that is not true must not look good. Must
//! not know how llama.cpp was built or run.

use std::fmt::{self, Display, Formatter};

use anyhow::{bail, Context, Result};
use serde::Deserialize;

/// The counters after one ubatch. They only grow, and are sums over the layers.
#[derive(Deserialize, Clone, Default)]
pub struct Line {
    n_tokens: u64,
    path: Path,
    appended_prefill: u64,
    appended_decode: u64,
    sealed_prefill: u64,
    sealed_decode: u64,
    attended_exact: u64,
    attended_coded: u64,
    reconstructed: u64,
    fits: u64,
    ns_encode: u64,
    ns_attend: u64,
    ns_host: u64,
    bytes_held: u64,
    bytes_f16: u64,
    code_bits: f64,
}

/// Which way through the cache a ubatch took.
#[derive(Deserialize, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Path {
    #[default]
    Prefill,
    Decode,
}

impl Line {
    fn appended(&self) -> u64 {
        self.appended_prefill + self.appended_decode
    }

    fn sealed(&self) -> u64 {
        self.sealed_prefill + self.sealed_decode
    }
}

/// Reads a log of one JSON object per line.
pub fn read(text: &str) -> Result<Vec<Line>> {
    let parse =
        |(i, line): (usize, &str)| serde_json::from_str(line).with_context(|| format!("line {} of the counters is not understood: {line}", i + 1));
    text.lines().enumerate().map(parse).collect()
}

/// A planted fact that is asked for, and whether the text has it.
pub struct Recall {
    /// The fact's name in the prompt.
    pub name: String,
    /// What the prompt says.
    pub expected: String,
    /// What the generated text begins with.
    pub got: String,
}

impl Recall {
    /// Finds the question at the end of a prompt, and the answer at the start of the generated text. The question can be the
    /// sentence of the fact, up to the code. None if the prompt does not end with a question about a fact that it has.
    pub fn find(prompt: &str, generated: &str) -> Option<Self> {
        let prompt = prompt.trim_end();
        let asked = |start: &str, end: &str| prompt.rsplit_once(start).and_then(|(before, name)| Some((before, name.strip_suffix(end)?)));
        let (before, name) = asked("what is the secret code for ", "? Answer:").or_else(|| asked("The secret code for ", " is"))?;
        let (_, fact) = before.split_once(&format!("The secret code for {name} is "))?;
        let digits = |s: &str| s.chars().take_while(char::is_ascii_digit).collect::<String>();
        let (name, expected) = (name.to_string(), digits(fact));
        let start = generated.trim_start();
        let got = if digits(start).is_empty() { start.chars().take(12).collect() } else { digits(start) };
        (!expected.is_empty()).then_some(Self { name, expected, got })
    }
}

/// One generated token: what the counters were after it, and the rows that it alone attended to.
struct Step {
    after: Line,
    exact: u64,
    coded: u64,
}

/// What was asked, what was counted, and what of it does not hold.
pub struct Report {
    ratio: f64,
    ctx: u32,
    tokens: u64,
    /// How many tokens went in, and through how many layers each of them went.
    prompt: u64,
    layers: u64,
    steps: Vec<Step>,
    last: Line,
    recall: Option<Recall>,
    /// Why the counters do not prove that decoding works on the cache; empty if they do.
    pub faults: Vec<String>,
}

impl Report {
    /// Judges a run that was asked for `tokens` tokens.
    pub fn new(lines: &[Line], ratio: f64, ctx: u32, tokens: u32, recall: Option<Recall>) -> Result<Self> {
        let Some(last) = lines.last().cloned() else {
            bail!("llama.cpp wrote no counters: its KV cache was not a spectral one");
        };
        let mut before = Line::default();
        let mut steps = vec![];
        let mut prompt = 0;
        for line in lines {
            if line.path == Path::Decode && line.n_tokens == 1 {
                let exact = line.attended_exact.saturating_sub(before.attended_exact);
                let coded = line.attended_coded.saturating_sub(before.attended_coded);
                steps.push(Step { after: line.clone(), exact, coded });
            } else {
                prompt += line.n_tokens;
            }
            before = line.clone();
        }
        let all = prompt + steps.len() as u64;
        let layers = last.appended().checked_div(all).unwrap_or(0);
        let mut report = Self { ratio, ctx, tokens: tokens.into(), prompt, layers, steps, last, recall, faults: vec![] };
        report.judge(all);
        Ok(report)
    }

    fn judge(&mut self, all: u64) {
        let mut faults = vec![];
        let mut must = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        let n = self.steps.len() as u64;
        // The last token is printed and not decoded again.
        must(n + 1 >= self.tokens, format!("{n} decode steps for {} generated tokens", self.tokens));
        must(
            self.layers > 0 && self.layers * all == self.last.appended(),
            format!("{} rows appended for {all} tokens: not the same number for each", self.last.appended()),
        );
        must(self.last.sealed_prefill > 0, "no row of the prompt was sealed".into());
        must(self.last.bytes_held < self.last.bytes_f16, format!("{} bytes held, and f16 needs {}", self.last.bytes_held, self.last.bytes_f16));
        if let (Some(first), Some(last)) = (self.steps.first(), self.steps.last()) {
            let pairs = || self.steps.windows(2);
            let stuck = pairs().filter(|w| w[1].after.appended_decode <= w[0].after.appended_decode).count();
            must(stuck == 0, format!("{stuck} decode steps appended no row"));
            let partial = self.steps.iter().filter(|s| s.exact + s.coded != s.after.appended()).count();
            must(partial == 0, format!("{partial} decode steps did not attend to each cached row exactly once"));
            let frozen = pairs().filter(|w| w[1].exact + w[1].coded <= w[0].exact + w[0].coded).count();
            must(frozen == 0, format!("{frozen} decode steps did not attend to more rows than the step before"));
            must(
                first.coded > 0 && last.coded > first.coded,
                format!("coded rows attended did not grow: {} in the first step, {} in the last", first.coded, last.coded),
            );
            let seals = pairs().filter(|w| w[1].after.sealed_decode > w[0].after.sealed_decode).count();
            must(seals >= 2, format!("decoding sealed rows {seals} times, and must at least twice"));
        }
        self.faults = faults;
    }

    /// At most `n` steps, spread evenly, with the first and the last one.
    fn sample(&self, n: usize) -> impl Iterator<Item = (usize, &Step)> {
        let len = self.steps.len();
        let n = n.min(len);
        (0..n).map(move |i| if n < 2 { 0 } else { i * (len - 1) / (n - 1) }).map(|i| (i, &self.steps[i]))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let last = &self.last;
        let layers = self.layers.max(1);
        let rows = |sum: u64| sum / layers;
        let ms = |ns: u64| format!("{:.1} ms", ns as f64 / 1e6);
        let mib = |b: u64| format!("{:.2} MiB", b as f64 / (1 << 20) as f64);
        let in_decode = |of: fn(&Step) -> u64| rows(self.steps.iter().map(of).sum());

        writeln!(f, "counters of the cache (rows are per layer; {} layers)", self.layers)?;
        writeln!(f, "  prompt            {} tokens", self.prompt)?;
        writeln!(f, "  generated         {} tokens, in {} decode steps", self.tokens, self.steps.len())?;
        writeln!(f, "  rows sealed       {} in prefill, {} in decode", rows(last.sealed_prefill), rows(last.sealed_decode))?;
        writeln!(f, "  rows attended     {} exact and {} coded, summed over the decode steps", in_decode(|s| s.exact), in_decode(|s| s.coded))?;
        writeln!(f, "  rows rebuilt      {}, a tile at a time, for prefill", rows(last.reconstructed))?;
        let (held, f16) = (last.bytes_held, last.bytes_f16);
        writeln!(f, "  bytes held        {} ({held}) for {} tokens; f16: {} ({f16})", mib(held), self.ctx, mib(f16))?;
        writeln!(f, "  ratio             {:.2} ({} asked)", f16 as f64 / held.max(1) as f64, self.ratio)?;
        writeln!(f, "  code bits         {:.2} per element", last.code_bits)?;
        let times = [last.ns_encode, last.ns_attend, last.ns_host].map(ms);
        writeln!(f, "  time              encode {} ({} fits), attention {}, between graphs {}", times[0], last.fits, times[1], times[2])?;

        writeln!(f, "\n  {:>5} {:>8} {:>8} {:>14} {:>14}", "step", "cached", "sealed", "exact attended", "coded attended")?;
        for (i, step) in self.sample(9) {
            writeln!(
                f,
                "  {:>5} {:>8} {:>8} {:>14} {:>14}",
                i + 1,
                rows(step.after.appended()),
                rows(step.after.sealed()),
                rows(step.exact),
                rows(step.coded)
            )?;
        }
        if let Some(Recall { name, expected, got }) = &self.recall {
            let verdict = if got == expected { "right" } else { "WRONG" };
            writeln!(f, "\n  recall            {verdict}: the code for {name} is {expected}, the text says {got:?}")?;
        }
        match self.faults.as_slice() {
            [] => writeln!(f, "\n  Decoding appended, sealed and attended to new rows all the way."),
            faults => {
                writeln!(f, "\n  The counters do NOT show that decoding works on the cache:")?;
                faults.iter().try_for_each(|fault| writeln!(f, "  - {fault}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1024 prompt tokens in 2 layers, then `steps` tokens; tiles of 64 rows, 192 rows exact at most.
    fn log(steps: u64, decode_works: bool) -> Vec<Line> {
        let mut line = Line { n_tokens: 1024, appended_prefill: 2048, sealed_prefill: 2 * 832, bytes_held: 10, bytes_f16: 80, ..Line::default() };
        let mut lines = vec![line.clone()];
        for i in 1..=steps {
            line.n_tokens = 1;
            line.path = Path::Decode;
            if decode_works {
                line.appended_decode = 2 * i;
                line.sealed_decode = 2 * (i / 64 * 64);
            }
            let sealed = line.sealed() / 2;
            line.attended_coded += 2 * sealed;
            line.attended_exact += 2 * (line.appended() / 2 - sealed);
            lines.push(line.clone());
        }
        lines
    }

    #[test]
    fn a_good_run_has_no_faults() {
        let report = Report::new(&log(191, true), 8.0, 4096, 192, None).unwrap();
        assert_eq!(report.faults, Vec::<String>::new());
        assert_eq!((report.prompt, report.layers), (1024, 2));
        let text = report.to_string();
        assert!(text.contains("832 in prefill, 128 in decode") && text.contains("8.00 (8 asked)"), "{text}");
        assert!(text.contains("191     1215      960            255            960"), "{text}");
    }

    #[test]
    fn a_frozen_decode_is_told() {
        let report = Report::new(&log(191, false), 8.0, 4096, 192, None).unwrap();
        let faults = report.faults.join("\n");
        for part in ["appended no row", "did not attend to more rows", "coded rows attended did not grow", "sealed rows 0 times"] {
            assert!(faults.contains(part), "{part}: {faults}");
        }
    }

    #[test]
    fn a_row_that_is_left_out_is_told() {
        let mut lines = log(191, true);
        lines[100..].iter_mut().for_each(|l| l.attended_coded -= 1);
        let report = Report::new(&lines, 8.0, 4096, 192, None).unwrap();
        assert_eq!(report.faults, ["1 decode steps did not attend to each cached row exactly once"]);
    }

    #[test]
    fn a_bypassed_or_silent_cache_is_told() {
        let prefill = log(0, true);
        let report = Report::new(&prefill, 8.0, 4096, 192, None).unwrap();
        assert!(report.faults[0].contains("0 decode steps for 192"));
        assert!(Report::new(&[], 8.0, 4096, 192, None).is_err());
    }

    #[test]
    fn reads_the_log() {
        let ok = r#"{"n_tokens":1,"path":"decode","appended_prefill":1,"appended_decode":1,"sealed_prefill":0,"sealed_decode":0,"attended_exact":2,"attended_coded":0,"reconstructed":0,"fits":0,"ns_encode":1,"ns_attend":1,"ns_host":1,"bytes_held":1,"bytes_f16":8,"ratio":8.0,"code_bits":1.75}"#;
        assert_eq!(read(ok).unwrap().len(), 1);
        let e = read(&format!("{ok}\n{{\"n_tokens\":1}}")).err().unwrap().to_string();
        assert!(e.contains("line 2"), "{e}");
    }

    #[test]
    fn recall_is_exact() {
        let prompt = "a\nThe secret code for Red box is 12345.\nb\nQuestion: what is the secret code for Red box? Answer:\n";
        let recall = Recall::find(prompt, " 12345.\nmore").unwrap();
        assert_eq!((recall.expected.as_str(), recall.got.as_str()), ("12345", "12345"));
        assert_eq!(Recall::find(prompt, " 123456").unwrap().got, "123456");
        assert_eq!(Recall::find(prompt, " no idea").unwrap().got, "no idea");
        assert!(Recall::find("no question", " 12345").is_none());
        let again = "The secret code for Red box is 12345.\nb\nThe secret code for Red box is";
        assert_eq!(Recall::find(again, " 12345.").unwrap().expected, "12345");
        assert!(Recall::find("The secret code for Red box is", " 12345.").is_none());
    }
}
