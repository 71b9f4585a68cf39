//! The results of an evaluation as numbers: what `eval.json` holds, and what tables and plots are made from.
//!
//! Owns how positions, texts and needles are pooled. Nothing in it depends on the time or the place of a run.

use serde::Serialize;

use super::corpus::Needle;
use super::curve::{self, Beside, Curve, Point};
use super::scenario::AFTER;
use crate::judge::{mean, quantile, Positions};
use crate::law::Law;

/// Bins of position and of depth.
pub const BINS: usize = 8;

/// All results.
#[derive(Serialize)]
pub struct Summary {
    /// Version of the program.
    pub version: &'static str,
    /// The model.
    pub model: Model,
    /// Text files, behind them the one of the switch and the code.
    pub texts: Vec<Source>,
    /// How it was run.
    pub options: Used,
    /// What each setting holds.
    pub settings: Vec<Entry>,
    /// The measures, by path.
    pub paths: Vec<PathResults>,
}

/// A model.
#[derive(Serialize)]
pub struct Model {
    /// File name.
    pub file: String,
    /// llama.cpp's words for it.
    pub description: String,
    /// Of the file.
    pub sha256: String,
}

/// A text file.
#[derive(Serialize)]
pub struct Source {
    /// File name.
    pub file: String,
    /// Of the file.
    pub sha256: String,
    /// Its length in tokens.
    pub tokens: usize,
}

/// The options that results depend on.
#[derive(Serialize)]
pub struct Used {
    /// Positions of the contexts.
    pub ctx: u32,
    /// Tokens of a text.
    pub length: usize,
    /// Texts.
    pub texts: usize,
    /// Texts with needles.
    pub needles: usize,
    /// Exact recent rows.
    pub window: usize,
    /// Exact first rows.
    pub sinks: usize,
    /// Of all random choices.
    pub seed: u64,
    /// Tokens of an ubatch on the decode path.
    pub step: u32,
    /// How the weights were widened, if they were.
    pub weights: Option<String>,
    /// Threads of llama.cpp.
    pub threads: usize,
}

/// A setting and what it holds.
#[derive(Serialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// stock, simulated or spectral.
    pub origin: &'static str,
    /// What it has in common with settings that differ in their size only.
    pub family: Option<String>,
    /// Bytes for the whole context: measured, or nominal where simulated.
    pub bytes: f64,
    /// f16 bytes over these.
    pub ratio: f64,
    /// Code bits per element.
    pub code_bits: f64,
}

/// The measures on one path.
#[derive(Serialize)]
pub struct PathResults {
    /// decode or prefill.
    pub path: String,
    /// One for each setting.
    pub rows: Vec<Row>,
    /// Divergence on texts against bytes.
    pub curves: Vec<Curve>,
    /// The other settings beside the curves of spectral ones.
    pub equal_bytes: Vec<Beside>,
}

impl PathResults {
    /// Adds the curves to the rows.
    pub fn of(path: &str, entries: &[Entry], rows: Vec<Row>) -> Self {
        let point = |(e, r): (&Entry, &Row)| {
            let kl = r.text.as_ref()?.kl_mean;
            Some((e.family.clone()?, Point { setting: e.name.clone(), bytes: e.bytes, kl }))
        };
        let curves = curve::curves(entries.iter().zip(&rows).filter_map(point));
        let equal_bytes = curve::beside(&curves, "spectral");
        Self { path: path.into(), rows, curves, equal_bytes }
    }
}

/// The measures of one setting; those that nobody asked for are missing.
#[derive(Serialize, Default)]
pub struct Row {
    /// Its name.
    pub setting: String,
    /// On prose.
    pub text: Option<Divergence>,
    /// Planted facts.
    pub needles: Option<Recall>,
    /// Near duplicates.
    pub functions: Option<Recall>,
    /// Greedy generation.
    pub greedy: Option<Greedy>,
    /// On the model's own words.
    pub continuation: Option<Divergence>,
    /// A change of topic.
    pub switch: Option<Switch>,
    /// Behind beginnings that say nothing.
    pub beginnings: Vec<Beginning>,
    /// After tokens were taken back.
    pub rewinds: Vec<Rewind>,
    /// Relative error of attention outputs, by layer and head.
    pub heads: Option<Vec<Vec<f64>>>,
    /// Where the divergence on prose comes from.
    pub law: Option<Law>,
}

/// How far next-token distributions are from f16's.
#[derive(Clone, Serialize)]
pub struct Divergence {
    /// Judged positions.
    pub positions: usize,
    /// Mean KL divergence in nats.
    pub kl_mean: f64,
    /// Over the second half of the judged positions of each text: there the first fit of a spectral cache is long past.
    pub kl_mean_late: f64,
    /// 99 % of all positions are below.
    pub kl_99: f64,
    /// 99.9 % of all positions are below.
    pub kl_999: f64,
    /// Share of positions with the same most likely token.
    pub same_top1: f64,
    /// Mean change of the negative log-likelihood of the text.
    pub nll_difference: f64,
    /// Mean KL divergence of each text.
    pub kl_mean_by_text: Vec<f64>,
    /// Mean KL divergence in equal parts of the judged positions, from first to last.
    pub kl_mean_by_position: Vec<f64>,
}

impl Divergence {
    /// Pools the positions of texts of equal length.
    pub fn of(texts: &[Positions]) -> Self {
        let kl: Vec<f64> = texts.iter().flat_map(|t| t.kl.iter().copied()).collect();
        let within = |bin: usize, bins: usize| {
            let part = |t: &Positions| t.kl[t.kl.len() * bin / bins..t.kl.len() * (bin + 1) / bins].to_vec();
            mean(texts.iter().flat_map(part))
        };
        Self {
            positions: kl.len(),
            kl_mean: mean(kl.iter().copied()),
            kl_mean_late: within(1, 2),
            kl_99: quantile(&kl, 0.99),
            kl_999: quantile(&kl, 0.999),
            same_top1: mean(texts.iter().flat_map(|t| t.same.iter().map(|s| f64::from(*s)))),
            nll_difference: mean(texts.iter().flat_map(|t| t.nll.iter().copied())),
            kl_mean_by_text: texts.iter().map(|t| mean(t.kl.iter().copied())).collect(),
            kl_mean_by_position: (0..BINS).map(|b| within(b, BINS)).collect(),
        }
    }
}

/// How many planted facts come back.
#[derive(Serialize)]
pub struct Recall {
    /// Facts asked for.
    pub asked: usize,
    /// Share of them answered exactly.
    pub found: f64,
    /// Share of those that f16 answers.
    pub found_of_f16: Option<f64>,
    /// Share by depth, from the beginning of the text to its end; none where no fact was planted.
    pub by_depth: Vec<Option<f64>>,
}

impl Recall {
    /// Pools texts: their needles, and for each needle whether this setting and f16 found it.
    pub fn of(texts: &[(&[Needle], &[u8], &[u8])]) -> Self {
        let mut all: Vec<(usize, bool, bool)> = vec![];
        for (needles, found, reference) in texts {
            let prose = needles.iter().map(|n| n.answer.start).min().unwrap_or(1);
            let bin = |n: &Needle| (n.planted * BINS / prose).min(BINS - 1);
            all.extend(needles.iter().zip(*found).zip(*reference).map(|((n, f), r)| (bin(n), *f == 1, *r == 1)));
        }
        let share = |of: &dyn Fn(&(usize, bool, bool)) -> bool| {
            let chosen: Vec<_> = all.iter().filter(|x| of(x)).collect();
            (!chosen.is_empty()).then(|| chosen.iter().filter(|x| x.1).count() as f64 / chosen.len() as f64)
        };
        Self {
            asked: all.len(),
            found: share(&|_| true).unwrap_or(0.0),
            found_of_f16: share(&|x| x.2),
            by_depth: (0..BINS).map(|b| share(&|x| x.0 == b)).collect(),
        }
    }
}

/// How long greedy generation goes f16's way.
#[derive(Serialize)]
pub struct Greedy {
    /// Tokens generated.
    pub tokens: usize,
    /// Those that are f16's at the same place.
    pub agreeing: usize,
    /// Tokens before the first that differs, if one does.
    pub first_divergence: Option<usize>,
}

impl Greedy {
    /// Compares two generations of the same length.
    pub fn of(reference: &[i32], got: &[i32]) -> Self {
        let same = || reference.iter().zip(got).map(|(r, g)| r == g);
        Self { tokens: got.len(), agreeing: same().filter(|s| *s).count(), first_divergence: same().position(|s| !s) }
    }
}

/// The same tokens after another topic and after their own.
#[derive(Serialize)]
pub struct Switch {
    /// After the text that comes before them.
    pub same_topic: Divergence,
    /// After another text.
    pub switched: Divergence,
    /// KL divergence after another text over that after their own; none where that is 0.
    pub ratio: Option<f64>,
}

impl Switch {
    /// Compares both.
    pub fn of(same_topic: Positions, switched: Positions) -> Self {
        let (same_topic, switched) = (Divergence::of(&[same_topic]), Divergence::of(&[switched]));
        let ratio = (same_topic.kl_mean > 0.0).then(|| switched.kl_mean / same_topic.kl_mean);
        Self { same_topic, switched, ratio }
    }
}

/// A text behind a beginning.
#[derive(Clone, Serialize)]
pub struct Beginning {
    /// Its kind.
    pub kind: String,
    /// On the second half of the text.
    pub divergence: Divergence,
    /// KL divergence over that without a beginning; none where that is 0.
    pub ratio: Option<f64>,
}

impl Beginning {
    /// Compares with the text that has none.
    pub fn of(kind: &str, judged: Positions, none: Option<&Beginning>) -> Self {
        let divergence = Divergence::of(&[judged]);
        let bare = none.map_or(divergence.kl_mean, |n| n.divergence.kl_mean);
        let ratio = (bare > 0.0).then(|| divergence.kl_mean / bare);
        Self { kind: kind.into(), divergence, ratio }
    }
}

/// The tokens after some were taken back.
#[derive(Serialize)]
pub struct Rewind {
    /// How many were.
    pub tokens: usize,
    /// Mean KL divergence of the tokens after it.
    pub kl_mean: f64,
    /// Mean KL divergence of the first of them.
    pub kl_first: f64,
    /// Mean KL divergence at each place.
    pub kl_mean_by_place: Vec<f64>,
}

impl Rewind {
    /// From the positions of all places, one after the other.
    pub fn of(tokens: usize, judged: Positions) -> Self {
        let places = || judged.kl.chunks_exact(AFTER);
        Self {
            tokens,
            kl_mean: mean(judged.kl.iter().copied()),
            kl_first: mean(places().map(|p| p[0])),
            kl_mean_by_place: places().map(|p| mean(p.iter().copied())).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(kl: &[f64]) -> Positions {
        Positions { kl: kl.to_vec(), same: vec![1; kl.len()], nll: vec![0.5; kl.len() - 1] }
    }

    #[test]
    fn positions_are_pooled_by_text_and_place() {
        let d = Divergence::of(&[positions(&[0.0; 16]), positions(&[[0.0; 8], [4.0; 8]].concat())]);
        assert_eq!((d.positions, d.kl_mean, d.kl_mean_late, d.kl_999), (32, 1.0, 2.0, 4.0));
        assert_eq!(d.kl_mean_by_text, [0.0, 2.0]);
        assert_eq!(d.kl_mean_by_position, [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!((d.same_top1, d.nll_difference), (1.0, 0.5));
    }

    #[test]
    fn recall_by_depth() {
        let needles = [0, 10, 79].map(|planted| Needle { planted, answer: 80..81 });
        let r = Recall::of(&[(&needles, &[1, 0, 1], &[1, 1, 0])]);
        assert_eq!((r.asked, r.found, r.found_of_f16), (3, 2.0 / 3.0, Some(0.5)));
        assert_eq!(r.by_depth, [Some(1.0), Some(0.0), None, None, None, None, None, Some(1.0)]);
    }

    #[test]
    fn beginnings_and_rewinds_are_compared() {
        let none = Beginning::of("none", positions(&[0.5, 0.5]), None);
        let hello = Beginning::of("hello", positions(&[1.0, 3.0]), Some(&none));
        assert_eq!((none.ratio, hello.ratio), (Some(1.0), Some(4.0)));
        let kl = [vec![4.0], vec![1.0; AFTER - 1], vec![2.0], vec![0.0; AFTER - 1]].concat();
        let r = Rewind::of(200, positions(&kl));
        assert_eq!((r.kl_first, r.kl_mean_by_place.len()), (3.0, 2));
        assert_eq!(r.kl_mean, (4.0 + 23.0 + 2.0) / 48.0);
    }

    #[test]
    fn generations_are_compared_by_place() {
        let g = Greedy::of(&[1, 2, 3, 4], &[1, 2, 9, 4]);
        assert_eq!((g.tokens, g.agreeing, g.first_divergence), (4, 3, Some(2)));
        assert_eq!(Greedy::of(&[1], &[1]).first_divergence, None);
    }
}
