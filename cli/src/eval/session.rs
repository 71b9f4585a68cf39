//! One context that tokens are put into, along one of the two paths, with rows behind the window replaced where a codec
//! is simulated.
//!
//! Owns in which portions tokens go in: the same ubatches for every setting, so that nothing but the cache differs.

use std::ops::Range;

use anyhow::{ensure, Result};
use indicatif::ProgressBar;
use spectral_kv::rope::Rope;

use crate::probe::{Context, ContextSpec, Keep, LayerInfo, Probe, RopeInfo, Side, Tensor, Want};
use crate::rope;

use super::codec::Coder;
use super::settings::{Part, Setting};

/// Logits of one portion, as numbers; bounds the memory for large vocabularies.
const PORTION: usize = 1 << 25;

/// Takes a position and its logits.
pub type TakeLogits<'a> = dyn FnMut(usize, &[f32]) -> Result<()> + 'a;
/// Takes what was seen.
pub type TakeSeen<'a> = dyn FnMut(Seen) -> Result<()> + 'a;

/// The attention of a layer at one position.
pub struct Seen {
    /// The position.
    pub position: usize,
    /// The layer.
    pub layer: usize,
    /// The outputs of its heads.
    pub attention: Vec<f32>,
    /// In the reference, the sum that they go into; elsewhere what the cache's codes change in them, as the probe tells it. Empty
    /// where that is not known.
    pub more: Vec<f32>,
}

/// How a context is fed.
#[derive(Clone, Copy, Debug)]
pub struct Feed {
    /// Positions of the context.
    pub ctx: u32,
    /// Tokens that attend at once.
    pub ubatch: u32,
    /// Recent rows that stay exact.
    pub window: usize,
    /// First rows that stay exact, where a codec is simulated.
    pub sinks: usize,
}

/// The next rows to be replaced: blocks one after the other, each as soon as all of it lies behind the window.
struct Sealer {
    next: Range<usize>,
    window: usize,
}

impl Sealer {
    /// How many rows must be there before the next block can be replaced.
    fn due(&self) -> usize {
        self.next.end + self.window
    }

    /// Rows from `n` on are gone. What was replaced below stays so.
    fn truncate(&mut self, n: usize) {
        let start = self.next.start.min(n);
        self.next = start..start + self.next.len();
    }

    /// The next block, if `n` rows are enough for it.
    fn take(&mut self, n: usize) -> Option<Range<usize>> {
        (n >= self.due()).then(|| {
            let next = self.next.end..self.next.end + self.next.len();
            std::mem::replace(&mut self.next, next)
        })
    }
}

struct Simulation {
    coder: Coder,
    part: Part,
    sealer: Sealer,
    ropes: Vec<Rope>,
}

/// An open context and what is in it.
pub struct Session<'a> {
    probe: &'a mut Probe,
    context: Context,
    simulation: Option<Simulation>,
    ubatch: usize,
    n: usize,
    bar: ProgressBar,
}

impl<'a> Session<'a> {
    /// Opens a context for a setting.
    pub fn open(probe: &'a mut Probe, setting: &Setting, feed: &Feed, keep: Keep, bar: &ProgressBar) -> Result<Self> {
        let simulation = match setting.simulated() {
            None => None,
            Some((codec, part)) => {
                let info = probe.info();
                let ropes = info.layers.iter().map(|l| rope(&info.rope, l)).collect::<Result<_>>()?;
                let sealer = Sealer { next: feed.sinks..feed.sinks + codec.rows(), window: feed.window };
                Some(Simulation { coder: Coder::new(codec), part, sealer, ropes })
            }
        };
        let spec = ContextSpec { n_ctx: feed.ctx, n_ubatch: feed.ubatch, cache: setting.cache(feed.window), keep };
        let context = probe.open(&spec)?;
        Ok(Self { probe, context, simulation, ubatch: feed.ubatch as usize, n: 0, bar: bar.clone() })
    }

    /// What llama.cpp says about the context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Closes the context. An error on the way leaves it open, but then the evaluation ends with the process.
    pub fn close(self) -> Result<()> {
        self.probe.close(&self.context)
    }

    /// Appends tokens and hands over the logits of those from position `from` on.
    pub fn push(&mut self, tokens: &[i32], from: usize, each: &mut TakeLogits) -> Result<()> {
        let vocabulary = self.probe.info().n_vocab;
        let mut rest = tokens;
        while !rest.is_empty() {
            let (portion, later) = rest.split_at(self.portion(rest.len()));
            rest = later;
            let first = self.n;
            let wanted = first + portion.len() > from;
            let logits = self.decode(portion, if wanted { Want::All } else { Want::None }, &[])?;
            ensure!(!wanted || logits.len() == portion.len() * vocabulary, "llama.cpp gave {} logits for {} tokens", logits.len(), portion.len());
            for (i, logits) in logits.chunks_exact(vocabulary).enumerate() {
                if first + i >= from {
                    each(first + i, logits)?;
                }
            }
        }
        Ok(())
    }

    /// Forgets positions from `n` on.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        self.probe.truncate(&self.context, n)?;
        self.n = n;
        if let Some(s) = &mut self.simulation {
            s.sealer.truncate(n);
        }
        Ok(())
    }

    /// Appends tokens and hands over the attention of each layer at some positions, given in ascending order.
    pub fn push_seen(&mut self, tokens: &[i32], positions: &[usize], more: Tensor, each: &mut TakeSeen) -> Result<()> {
        let layers = self.probe.info().layers.clone();
        for portion in tokens.chunks(self.ubatch) {
            let first = self.n;
            let within: Vec<usize> = positions.iter().filter_map(|p| p.checked_sub(first)).filter(|p| *p < portion.len()).collect();
            self.decode(portion, Want::None, &within)?;
            if within.is_empty() {
                continue;
            }
            for (layer, info) in layers.iter().enumerate().filter(|(_, l)| l.n_head > 0) {
                let size = info.n_head * info.d_v;
                let outputs = self.probe.captured(&self.context, layer, Tensor::Attention)?;
                ensure!(outputs.len() == portion.len() * size, "llama.cpp gave {} attention outputs for {} tokens", outputs.len(), portion.len());
                // Not of every architecture.
                let more = self.probe.captured(&self.context, layer, more).unwrap_or_default();
                let n_more = more.len() / within.len();
                for (i, p) in within.iter().enumerate() {
                    let (attention, more) = (outputs[p * size..][..size].to_vec(), more[i * n_more..][..n_more].to_vec());
                    each(Seen { position: first + p, layer, attention, more })?;
                }
            }
        }
        Ok(())
    }

    /// How many tokens can go in at once: whole ubatches, not too many logits, and no row replaced late.
    fn portion(&self, available: usize) -> usize {
        let limit = (PORTION / self.probe.info().n_vocab.max(1)).clamp(1, 512);
        let until_due = self.simulation.as_ref().map_or(limit, |s| s.sealer.due().saturating_sub(self.n).max(1));
        let whole = limit.min(until_due).div_ceil(self.ubatch) * self.ubatch;
        whole.min(available)
    }

    fn decode(&mut self, tokens: &[i32], want: Want, judged: &[usize]) -> Result<Vec<f32>> {
        let logits = self.probe.decode(&self.context, tokens, want, judged)?;
        self.n += tokens.len();
        self.bar.inc(tokens.len() as u64);
        if let Some(s) = &mut self.simulation {
            let layers = self.probe.info().layers.clone();
            while let Some(block) = s.sealer.take(self.n) {
                for (l, layer) in layers.iter().enumerate().filter(|(_, l)| l.n_head_kv > 0) {
                    for side in [Side::K, Side::V].into_iter().filter(|side| s.part.has(l, *side)) {
                        let mut rows = self.probe.rows(&self.context, l, side, block.start, block.len())?;
                        s.coder.round_trip(layer, side, &s.ropes[l], block.start, &mut rows)?;
                        self.probe.set_rows(&self.context, l, side, block.start, &rows)?;
                    }
                }
            }
        }
        Ok(logits)
    }
}

fn rope(info: &RopeInfo, layer: &LayerInfo) -> Result<Rope> {
    if info.n_rot == 0 || layer.d_k == 0 {
        return Ok(Rope::identity());
    }
    Ok(Rope::new(&rope::params(info), layer.d_k)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_replaced_as_soon_as_they_are_behind_the_window() {
        let mut s = Sealer { next: 4..68, window: 128 };
        assert_eq!((s.due(), s.take(195)), (196, None));
        assert_eq!(s.take(196), Some(4..68));
        assert_eq!(s.take(259), None);
        // A long portion can bring several blocks; the one up to 388 would need 516 rows.
        let blocks: Vec<_> = std::iter::from_fn(|| s.take(515)).collect();
        assert_eq!(blocks, [68..132, 132..196, 196..260, 260..324]);
        // After going back the next block begins with the first new row.
        s.truncate(300);
        assert_eq!((s.due(), s.next.clone()), (492, 300..364));
        s.truncate(400);
        assert_eq!(s.next, 300..364);
    }
}
