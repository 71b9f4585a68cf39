//! Calibration: what fits found in texts, once for a model, in a file that caches of that model take their bases from.
//!
//! Owns the file and its checks. A file is bound to the model by a hash that the caller makes, and to each layer's heads and rope.
//! It holds transforms and errors, not bases: how many bits there are is for the cache that reads it to say. Must not know
//! where texts come from.
//!
//! Layout, little-endian: magic, version, model hash, number of layers; per layer whether it was analysed, its heads, its rope; per head K and V (the
//! mean of K in f32, variances in f64, both matrices as row scales in f32 and f16 with rows scaled to a largest element of 1, which is as
//! precise as what a cache stores), both errors, the output and the stream in f64; CRC-32 of all that.

use super::basis::row_scale;
use super::fit::{analyse, HeadRows, HeadSpectrum, Place, Residual, Sample, Transform};
use crate::config::{Config, LayerShape, Scoring};
use crate::error::{argument, Error, Result};
use crate::layout::anchor;
use crate::layout::{Heads, TILE};
use crate::rope::{Rope, RopeParams};
use crate::simd;
use half::f16;

const MAGIC: u64 = u64::from_le_bytes(*b"SKVBASIS");
const VERSION: u32 = 4;
/// Bits per element at which errors are measured: what caches will have, about. Which heads have large ones depends little on it.
const BITS: f64 = 2.0;
const MAX_LAYERS: usize = 4096;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Tells the model from others.
    pub model_hash: u64,
    /// By the model's numbers; `None` where a layer has no attention to calibrate.
    pub layers: Vec<Option<CalibratedLayer>>,
}

/// What is known of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibratedLayer {
    /// Its heads.
    pub shape: LayerShape,
    /// Its rope, as [`Rope::to_bytes`] gives it.
    pub rope: Vec<u8>,
    /// What was found in each KV head.
    pub heads: Vec<HeadSpectrum>,
}

/// Rows of one text in one layer, as the model gives them (roped), from position 0 on.
pub struct Text {
    /// `[position][KV head][d_k]`.
    pub k: Vec<f16>,
    /// `[position][KV head][d_v]`.
    pub v: Vec<f16>,
    /// Positions of the queries.
    pub q_positions: Vec<i32>,
    /// `[query][query head][d_k]`.
    pub q: Vec<f16>,
    /// `|x|^2` of the residual stream behind the attention of each query; nothing where that is not known.
    pub residual: Vec<f32>,
}

/// How a layer works, as far as a calibration depends on it.
pub struct LayerModel<'a> {
    /// Its heads.
    pub shape: LayerShape,
    /// Its rope.
    pub rope: &'a RopeParams,
    /// Its scores.
    pub scoring: Scoring,
    /// Rows of its output projection, `n_head * d_v` each, or nothing for identity.
    pub projection: &'a [f32],
    /// The longest distance at which rows will be looked at.
    pub distance: u32,
}

impl CalibratedLayer {
    /// Analyse a layer's rows of some texts. Window and sinks are those that a cache has by default.
    pub fn new(model: &LayerModel, texts: &[Text]) -> Result<Self> {
        let (g, rope) = (Heads::of(&model.shape), Rope::new(model.rope, model.shape.d_k as usize)?);
        check(&g, model, texts)?;
        let config = Config::default();
        let n_rows = |t: &Text| t.k.len() / (g.n_head_kv * g.d_k);
        let (mut rows, mut turns, mut queries, mut residual) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let known = texts.iter().all(|t| !t.residual.is_empty());
        for (seq, t) in texts.iter().enumerate() {
            let place = |pos: i32| Place { pos, seq: seq as i32 };
            let n = n_rows(t) as i32;
            rows.extend((0..n).map(place));
            // Tiles have the rows from the sinks on.
            let (sinks, tile) = (config.sinks as i32, TILE as i32);
            let first = |row: i32| sinks + (row - sinks).div_euclid(tile) * tile;
            turns.extend((0..n).map(|row| -anchor(first(row) + ((first(row) + tile).min(n) - first(row)) / 2)));
            queries.extend(t.q_positions.iter().copied().map(place));
            residual.extend(t.residual.iter().filter(|_| known));
        }
        let sample = Sample {
            rows: &rows,
            turns: &turns,
            queries: &queries,
            residual: if known { Residual::After(&residual) } else { Residual::Unknown },
            projection: model.projection,
            scale: model.scoring.scale,
            softcap: model.scoring.softcap,
            window: config.window as i32,
            sinks: config.sinks as i32,
            n_cells: i64::from(model.distance),
            bits: BITS,
        };
        let heads = (0..g.n_head_kv).map(|head| analyse(simd::kernels(), &g, &rope, &sample, head, &head_rows(&g, texts, head)));
        Ok(CalibratedLayer { shape: model.shape, rope: rope.to_bytes(), heads: heads.collect::<Result<_>>()? })
    }
}

/// Refuse what nothing can be found in.
fn check(g: &Heads, model: &LayerModel, texts: &[Text]) -> Result<()> {
    let (nk, nv, nq) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v, g.n_head * g.d_k);
    for t in texts {
        let residual = t.residual.is_empty() || t.residual.len() == t.q_positions.len();
        if !t.k.len().is_multiple_of(nk) || t.v.len() != t.k.len() / nk * nv || t.q.len() != t.q_positions.len() * nq || !residual {
            return argument("keys, values and queries of a text do not go together");
        }
        if !t.k.iter().chain(&t.v).chain(&t.q).all(|x| x.is_finite()) || !t.residual.iter().all(|x| x.is_finite()) {
            return Err(Error::NotFinite("a query, key or value of a text".into()));
        }
    }
    if !model.projection.iter().all(|x| x.is_finite()) || !model.projection.len().is_multiple_of(g.n_head * g.d_v) {
        return argument("the output projection is not finite or does not consist of whole rows");
    }
    if texts.iter().all(|t| t.k.len() / nk <= Config::default().sinks as usize) {
        return argument("no text is longer than the rows that stay exact");
    }
    Ok(())
}

/// What texts have of one head.
fn head_rows(g: &Heads, texts: &[Text], head: usize) -> HeadRows {
    let mut own = HeadRows::default();
    let take = |out: &mut Vec<f32>, rows: &[f16], n: usize, d: usize| {
        out.extend(rows.chunks_exact(n * d).flat_map(|row| &row[head * d..(head + 1) * d]).map(|x| x.to_f32()));
    };
    for t in texts {
        take(&mut own.k, &t.k, g.n_head_kv, g.d_k);
        take(&mut own.v, &t.v, g.n_head_kv, g.d_v);
        take(&mut own.q, &t.q, g.n_head_kv, g.group() * g.d_k);
    }
    own
}

fn put_matrix(out: &mut Vec<u8>, rows: &[f32], d: usize) {
    let scales: Vec<f32> = rows.chunks_exact(d).map(row_scale).collect();
    scales.iter().for_each(|s| out.extend(s.to_le_bytes()));
    for (row, scale) in rows.chunks_exact(d).zip(scales) {
        row.iter().for_each(|x| out.extend(f16::from_f32(x / scale).to_le_bytes()));
    }
}

impl Calibration {
    /// What is known of a layer, by the model's number.
    pub fn layer(&self, layer: usize, heads: &Heads, rope: &Rope) -> Result<&CalibratedLayer> {
        let Some(Some(l)) = self.layers.get(layer) else {
            return Err(Error::Data(format!("the calibration has no layer {layer}")));
        };
        if Heads::of(&l.shape) != *heads {
            return Err(Error::Data(format!("layer {layer} of the calibration has other heads")));
        }
        if l.rope != rope.to_bytes() {
            return Err(Error::Data(format!("layer {layer} of the calibration has other RoPE settings")));
        }
        Ok(l)
    }

    /// As a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.extend(self.model_hash.to_le_bytes());
        out.extend((self.layers.len() as u32).to_le_bytes());
        for layer in &self.layers {
            out.extend(u32::from(layer.is_some()).to_le_bytes());
            let Some(l) = layer else { continue };
            for x in [l.shape.n_head, l.shape.n_head_kv, l.shape.d_k, l.shape.d_v, l.rope.len() as u32] {
                out.extend(x.to_le_bytes());
            }
            out.extend(&l.rope);
            for head in &l.heads {
                for t in [&head.k, &head.v] {
                    t.mean.iter().for_each(|x| out.extend(x.to_le_bytes()));
                    t.variance.iter().for_each(|x| out.extend(x.to_le_bytes()));
                    put_matrix(&mut out, &t.encode, t.variance.len());
                    put_matrix(&mut out, &t.decode, t.variance.len());
                }
                head.errors.iter().chain([&head.output, &head.stream]).for_each(|e| out.extend(e.to_le_bytes()));
            }
        }
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Read what [`Calibration::to_bytes`] gave. Anything else is [`Error::Data`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader { bytes };
        if r.int::<8>().map(u64::from_le_bytes) != Ok(MAGIC) {
            return bad("not a calibration");
        }
        let version = u32::from_le_bytes(r.int()?);
        if version != VERSION {
            return bad(&format!("version {version}, this library reads {VERSION}"));
        }
        let Some((body, crc)) = bytes.split_last_chunk::<4>().filter(|(body, _)| body.len() >= 12) else {
            return bad("truncated");
        };
        if crc32fast::hash(body).to_le_bytes() != *crc {
            return bad("the checksum is wrong: truncated or corrupted");
        }
        r.bytes = &body[12..];
        let model_hash = u64::from_le_bytes(r.int()?);
        let n_layers = r.count(MAX_LAYERS)?;
        let layers = (0..n_layers).map(|_| if r.count(1)? == 1 { r.layer().map(Some) } else { Ok(None) }).collect::<Result<_>>()?;
        if !r.bytes.is_empty() {
            return bad("bytes behind its end");
        }
        Ok(Calibration { model_hash, layers })
    }
}

fn bad<T>(what: &str) -> Result<T> {
    Err(Error::Data(format!("calibration: {what}")))
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((head, tail)) = self.bytes.split_at_checked(n) else { return bad("truncated") };
        self.bytes = tail;
        Ok(head)
    }
    fn int<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("invariant: as many bytes as were taken"))
    }
    fn count(&mut self, most: usize) -> Result<usize> {
        let n = u32::from_le_bytes(self.int()?) as usize;
        if n > most {
            return bad(&format!("a count of {n} where {most} are possible"));
        }
        Ok(n)
    }
    fn f32s(&mut self, n: usize) -> Result<Vec<f32>> {
        let float = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
        let x: Vec<f32> = self.take(4 * n)?.chunks_exact(4).map(float).collect();
        if x.iter().all(|x| x.is_finite()) {
            Ok(x)
        } else {
            bad("a number that is not finite")
        }
    }
    /// Numbers that cannot be negative.
    fn f64s(&mut self, n: usize) -> Result<Vec<f64>> {
        let float = |b: &[u8]| f64::from_le_bytes(b.try_into().expect("invariant: eight bytes"));
        let x: Vec<f64> = self.take(8 * n)?.chunks_exact(8).map(float).collect();
        if x.iter().all(|x| x.is_finite() && *x >= 0.0) {
            Ok(x)
        } else {
            bad("an error or variance that is negative or not finite")
        }
    }
    fn matrix(&mut self, d: usize) -> Result<Vec<f32>> {
        let scales = self.f32s(d)?;
        let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
        let rows = self.take(2 * d * d)?.chunks_exact(2 * d).zip(scales);
        let m: Vec<f32> = rows.flat_map(|(row, scale)| row.chunks_exact(2).map(move |b| half(b) * scale)).collect();
        if m.iter().all(|x| x.is_finite()) {
            Ok(m)
        } else {
            bad("a number that is not finite")
        }
    }
    fn transform(&mut self, d: usize, centred: bool) -> Result<Transform> {
        let mean = self.f32s(if centred { d } else { 0 })?;
        let variance = self.f64s(d)?;
        if variance[d - 1] <= 0.0 || variance.windows(2).any(|w| w[0] < w[1]) {
            return bad("variances that do not fall");
        }
        Ok(Transform { mean, variance, encode: self.matrix(d)?, decode: self.matrix(d)? })
    }
    fn layer(&mut self) -> Result<CalibratedLayer> {
        let [n_head, n_head_kv, d_k, d_v] = [self.count(4096)?, self.count(4096)?, self.count(1024)?, self.count(1024)?].map(|x| x as u32);
        let shape = LayerShape { n_head, n_head_kv, d_k, d_v };
        if !shape.is_possible() {
            return bad("heads that no model has");
        }
        let n_rope = self.count(1 << 16)?;
        let rope = self.take(n_rope)?.to_vec();
        let mut heads = Vec::new();
        for _ in 0..n_head_kv {
            let (k, v) = (self.transform(d_k as usize, true)?, self.transform(d_v as usize, false)?);
            let numbers = self.f64s(4)?;
            heads.push(HeadSpectrum { k, v, errors: [numbers[0], numbers[1]], output: numbers[2], stream: numbers[3] });
        }
        Ok(CalibratedLayer { shape, rope, heads })
    }
}
