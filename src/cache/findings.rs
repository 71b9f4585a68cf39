//! What fits found in the heads of all layers, while not all of them were studied, and how the bits of a tile are then shared out.
//!
//! One for all layers of a cache, on the heap. A study is one fit of one stream; who misses it studies again. Must not know about arenas, nor how
//! a head is analysed.

use crate::codec::fit::{relative_errors, share, HeadSpectrum, LEAST};
use crate::layout::geometry::{overhead_bytes, Geometry};
use crate::layout::{BANDS, TILE};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// The id of what comes from a calibration.
pub const CALIBRATED: i32 = 0;

/// What a head gets of a tile of each band.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Code bits of a row's key and of its value.
    pub bits: [[usize; 2]; BANDS],
    /// Where its piece begins in the block.
    pub offset: [usize; BANDS],
}

#[derive(Debug)]
struct Study {
    id: i32,
    heads: Vec<Option<Arc<HeadSpectrum>>>,
    /// Of all heads, when all have been studied.
    shares: Option<Arc<[Share]>>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Findings {
    studies: Mutex<Vec<Study>>,
    /// By stream: sum and number of what heads saw of drift.
    drift: Mutex<BTreeMap<i32, (f64, usize)>>,
}

impl Findings {
    fn lock(&self) -> MutexGuard<'_, Vec<Study>> {
        self.studies.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Note what was found in a head, counted over all layers.
    pub fn add(&self, g: &Geometry, id: i32, head: usize, found: HeadSpectrum) {
        let mut studies = self.lock();
        let at = studies.iter().position(|s| s.id == id).unwrap_or_else(|| {
            // A stream has one study at a time, and one that it gave up and did not tell of: what is more belongs to streams that are no more.
            if studies.len() > 2 * g.config.n_streams as usize {
                studies.retain(|s| s.id == CALIBRATED || s.id + 2 * g.config.n_streams as i32 > id);
            }
            studies.push(Study { id, heads: vec![None; g.n_heads()], shares: None });
            studies.len() - 1
        });
        let study = &mut studies[at];
        study.heads[head] = Some(Arc::new(found));
        if let Some(all) = study.heads.iter().map(|h| h.as_deref()).collect::<Option<Vec<_>>>() {
            study.shares = Some(shares(g, 0..g.layers.len(), &all).into());
        }
    }

    /// What was found in a head, and its share where all have been studied.
    pub fn head(&self, id: i32, head: usize) -> (Option<Arc<HeadSpectrum>>, Option<Share>) {
        let studies = self.lock();
        let Some(study) = studies.iter().find(|s| s.id == id) else { return (None, None) };
        (study.heads[head].clone(), study.shares.as_ref().map(|s| s[head]))
    }

    /// Note that a head's newest rows would be coded with an error that is `ratio` times what it was when the bases were fitted.
    pub fn add_drift(&self, stream: i32, ratio: f64) {
        let mut drift = self.drift.lock().unwrap_or_else(|e| e.into_inner());
        let (sum, n) = drift.entry(stream).or_default();
        (*sum, *n) = (*sum + ratio.max(1e-9).ln(), *n + 1);
    }

    /// The geometric mean of the ratios noted for a stream, and how many they are.
    pub fn drift(&self, stream: i32) -> Option<(f64, usize)> {
        let drift = self.drift.lock().unwrap_or_else(|e| e.into_inner());
        let (sum, n) = drift.get(&stream)?;
        Some(((sum / *n as f64).exp(), *n))
    }

    /// Forget what was noted for a stream.
    pub fn forget_drift(&self, stream: i32) {
        self.drift.lock().unwrap_or_else(|e| e.into_inner()).remove(&stream);
    }

    /// Forget a study.
    pub fn forget(&self, id: i32) {
        if id != CALIBRATED {
            self.lock().retain(|s| s.id != id);
        }
    }
}

/// The bytes of codes that the layers up to one have in a block of a band, when each gets what its elements are of all.
fn code_bytes(g: &Geometry, band: usize, layers: usize) -> usize {
    let sum = |n: usize, of: fn(&crate::layout::Heads) -> usize| g.layers[..n].iter().map(|h| h.n_head_kv * of(h)).sum::<usize>();
    let codes = g.shared_bytes[band].saturating_sub(sum(g.layers.len(), overhead_bytes));
    if layers == g.layers.len() {
        return codes;
    }
    let (part, all) = (sum(layers, |h| h.elements()), sum(g.layers.len(), |h| h.elements()));
    // Pieces begin at whole words of 8 bytes, and so do the layers' parts.
    (codes as u128 * part as u128 / all as u128) as usize / 8 * 8
}

/// The shares of all heads of some layers, of the part of a tile that is theirs by their elements: by the errors that coding makes.
pub fn shares(g: &Geometry, layers: Range<usize>, found: &[&HeadSpectrum]) -> Vec<Share> {
    let heads: Vec<_> = layers.clone().flat_map(|l| std::iter::repeat_n(g.layers[l], g.layers[l].n_head_kv)).collect();
    let mut left = found;
    let mut errors: Vec<(f64, usize)> = Vec::new();
    for layer in &g.layers[layers.clone()] {
        let (own, rest) = left.split_at(layer.n_head_kv);
        errors.extend(relative_errors(own).into_iter().flat_map(|[k, v]| [(k, layer.d_k), (v, layer.d_v)]));
        left = rest;
    }
    let elements: usize = errors.iter().map(|e| e.1).sum();
    let mut out = vec![Share::default(); heads.len()];
    for band in 0..BANDS {
        let (from, to) = (code_bytes(g, band, layers.start), code_bytes(g, band, layers.end));
        let bits = share(&errors, ((to - from) * 8 / TILE) as f64 / elements as f64, LEAST);
        let before: usize = g.layers[..layers.start].iter().map(|h| h.n_head_kv * overhead_bytes(h)).sum();
        let mut at = before + from;
        for ((head, share), bits) in heads.iter().zip(&mut out).zip(bits.chunks_exact(2)) {
            let whole = [(bits[0] * head.d_k as f64) as usize, (bits[1] * head.d_v as f64) as usize];
            (share.bits[band], share.offset[band]) = (whole, at);
            at += overhead_bytes(head) + whole.into_iter().sum::<usize>() * TILE / 8;
        }
    }
    out
}
