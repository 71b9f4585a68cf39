//! The codec of one head: a mean, a weighted Karhunen-Loeve basis, quantised coefficients and one gain per row.
//!
//! `x ~ mean + gain * sum_j level(code_j) * decode_j`. Basis and bit widths come from [`fit`]; rows are coded in tiles of 64.
//! Keys arrive in their tile's frame. Must not know about sequences, positions or cells.

pub mod bits;
pub mod fit;

use crate::config::{LayerGeometry, GAIN_BYTES, TILE};
use crate::error::{Error, Result};
use crate::simd::{quant, Kernels, Widths};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What is fitted for one head, K or V: the first `widths.rank()` coefficients matter.
#[derive(Debug, Clone, Default)]
pub struct Basis {
    /// Elements of a head.
    pub d: usize,
    /// Coefficients by width.
    pub widths: Widths,
    /// Mean of the rows.
    pub mean: Vec<f32>,
    /// `rank x d`: row `j` gives coefficient `j` with unit variance from a row less the mean.
    pub encode: Vec<f32>,
    /// `rank x d`: what a unit of coefficient `j` adds to a row.
    pub decode: Vec<f32>,
    /// Importance of a squared error in coefficient `j`.
    pub weight: Vec<f32>,
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("invariant: four bytes"))
}

fn put_f32(bytes: &mut [u8], i: usize, x: f32) {
    bytes[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}

impl Basis {
    /// Widths of a stored basis.
    pub fn widths_of(bytes: &[u8]) -> Widths {
        Widths { counts: std::array::from_fn(|i| usize::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))) }
    }

    /// Write in stored form: widths, mean, then per coefficient an encode scale, decode scale and weight in f32, then both
    /// matrices in f16 with rows scaled to a largest element of 1, so that no magnitude leaves the range of f16.
    pub fn store(&self, bytes: &mut [u8]) {
        let (d, r) = (self.d, self.widths.rank());
        bytes.fill(0);
        for (i, n) in self.widths.counts.into_iter().enumerate() {
            bytes[2 * i..2 * i + 2].copy_from_slice(&(n as u16).to_le_bytes());
        }
        let (floats, matrices) = bytes[16..].split_at_mut(16 * d);
        for (i, m) in self.mean.iter().enumerate() {
            put_f32(floats, i, *m);
        }
        for (part, rows) in [&self.encode, &self.decode].into_iter().enumerate() {
            for (j, row) in rows.chunks_exact(d).enumerate().take(r) {
                let largest = row.iter().fold(0.0f32, |a, x| a.max(x.abs())).max(f32::MIN_POSITIVE);
                put_f32(floats, (1 + part) * d + j, largest);
                let at = 2 * d * (part * d + j);
                for (out, x) in matrices[at..at + 2 * d].chunks_exact_mut(2).zip(row) {
                    out.copy_from_slice(&f16::from_f32(x / largest).to_le_bytes());
                }
            }
        }
        for (j, w) in self.weight.iter().enumerate().take(r) {
            put_f32(floats, 3 * d + j, *w);
        }
    }

    /// Read the stored form of a basis for heads of `d` elements, reusing this object's buffers.
    /// `with_encoder` false leaves out what only coding needs.
    pub fn load(&mut self, bytes: &[u8], d: usize, with_encoder: bool) -> Result<()> {
        self.d = d;
        self.widths = Self::widths_of(bytes);
        let r = self.widths.rank();
        if r > d || bytes.len() < LayerGeometry::basis_bytes_of(d) {
            return Err(Error::Data(format!("a basis of rank {r} for heads of {d} elements in {} bytes", bytes.len())));
        }
        let (floats, matrices) = bytes[16..].split_at(16 * d);
        self.mean.clear();
        self.mean.extend((0..d).map(|i| f32_at(floats, i)));
        self.weight.clear();
        self.encode.clear();
        if with_encoder {
            self.weight.extend((0..r).map(|j| f32_at(floats, 3 * d + j)));
        }
        for (part, rows) in [&mut self.encode, &mut self.decode].into_iter().enumerate() {
            if part == 0 && !with_encoder {
                continue;
            }
            rows.resize(r * d, 0.0);
            let from = 2 * d * part * d;
            f16s(&matrices[from..from + 2 * r * d])?.convert_to_f32_slice(rows);
            for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                let scale = f32_at(floats, (1 + part) * d + j);
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(())
    }
}

/// Bytes of an arena seen as f16.
pub(crate) fn f16s(bytes: &[u8]) -> Result<&[f16]> {
    if bytes.is_empty() {
        return Ok(&[]);
    }
    bytemuck::try_cast_slice(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}

/// Bytes of an arena seen as mutable f16.
pub(crate) fn f16s_mut(bytes: &mut [u8]) -> Result<&mut [f16]> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}

/// Bytes of one head's part of a tile.
pub fn head_tile_bytes(k: Widths, v: Widths) -> usize {
    GAIN_BYTES + k.bytes() + v.bytes()
}

/// One head's part of a tile: `(gains, codes)` of K and of V.
pub fn split_tile(tile: &[u8], k: Widths) -> [(&[u8], &[u8]); 2] {
    let (gains, codes) = tile.split_at(GAIN_BYTES);
    let (ck, cv) = codes.split_at(k.bytes());
    [(&gains[..TILE], ck), (&gains[TILE..], cv)]
}

/// Mutable [`split_tile`].
pub fn split_tile_mut(tile: &mut [u8], k: Widths) -> [(&mut [u8], &mut [u8]); 2] {
    let (gains, codes) = tile.split_at_mut(GAIN_BYTES);
    let (gk, gv) = gains.split_at_mut(TILE);
    let (ck, cv) = codes.split_at_mut(k.bytes());
    [(gk, ck), (gv, cv)]
}

/// Code one row of `d` elements as row `row` of a tile.
///
/// Coefficients are divided by their common magnitude, quantised, and the gain is then chosen by weighted least squares.
pub fn encode_row(kernels: &Kernels, basis: &Basis, x: &[f32], row: usize, gains: &mut [u8], codes: &mut [u8], scratch: &mut Vec<f32>) {
    let (d, r) = (basis.d, basis.widths.rank());
    scratch.clear();
    scratch.resize(d + r, 0.0);
    let (centred, z) = scratch.split_at_mut(d);
    for ((c, x), m) in centred.iter_mut().zip(x).zip(&basis.mean) {
        *c = x - m;
    }
    (kernels.matvec)(&basis.encode, centred, z);
    let power = z.iter().map(|z| z * z).sum::<f32>() / r.max(1) as f32;
    let scale = power.sqrt().max(1e-6);
    let (mut zo, mut oo) = (0.0f64, 0.0f64);
    for (j, z) in z.iter().enumerate() {
        let (width, at) = basis.widths.place(j);
        let code = quant::code(width, z / scale);
        quant::put(width, &mut codes[at..], row, code);
        let (o, w) = (f64::from(quant::level(width, code)), f64::from(basis.weight[j]));
        zo += f64::from(*z) * o * w;
        oo += o * o * w;
    }
    gains[row] = quant::gain_code(if oo > 0.0 { (zo / oo) as f32 } else { 0.0 });
}

/// Rebuild the rows of a tile that `wanted` has a bit for: `out[row] = mean + gain * coefficients`, `d` elements a row.
pub fn decode_rows(kernels: &Kernels, basis: &Basis, gains: &[u8], codes: &[u8], wanted: u64, out: &mut [f32], scratch: &mut Vec<f32>) {
    let (d, r) = (basis.d, basis.widths.rank());
    scratch.clear();
    scratch.resize(r * TILE + r, 0.0);
    let (values, row_values) = scratch.split_at_mut(r * TILE);
    for (j, v) in values.chunks_exact_mut(TILE).enumerate() {
        let (width, at) = basis.widths.place(j);
        quant::unpack(width, &codes[at..], v.try_into().expect("invariant: chunks of a tile"));
    }
    for (row, out) in out.chunks_exact_mut(d).enumerate().take(TILE).filter(|(row, _)| wanted >> row & 1 == 1) {
        let gain = quant::gain(gains[row]);
        for (v, rv) in values.chunks_exact(TILE).zip(row_values.iter_mut()) {
            *rv = v[row] * gain;
        }
        out.copy_from_slice(&basis.mean);
        (kernels.accumulate)(&basis.decode, row_values, out);
    }
}

/// Gain and coefficient offsets of a row of `tiles`, K then V.
fn row_parts(k: Widths, v: Widths, row: usize) -> ([(usize, usize, Widths); 2], usize) {
    let at = row / TILE * head_tile_bytes(k, v);
    ([(at, at + GAIN_BYTES, k), (at + TILE, at + GAIN_BYTES + k.bytes(), v)], row % TILE)
}

/// One head's gains and codes of row `row` (counted over all tiles), a byte each: K gain, K codes, V gain, V codes.
pub fn take_row(k: Widths, v: Widths, tiles: &[u8], row: usize) -> Vec<u8> {
    let (parts, row) = row_parts(k, v, row);
    let mut out = Vec::with_capacity(2 + k.rank() + v.rank());
    for (gains, codes, widths) in parts {
        out.push(tiles[gains + row]);
        out.extend((0..widths.rank()).map(|j| {
            let (width, at) = widths.place(j);
            quant::get(width, &tiles[codes + at..], row)
        }));
    }
    out
}

/// Write what [`take_row`] gave to row `row`.
pub fn put_row(k: Widths, v: Widths, tiles: &mut [u8], row: usize, taken: &[u8]) {
    let (parts, row) = row_parts(k, v, row);
    let mut taken = taken.iter();
    let mut next = || *taken.next().expect("invariant: a taken row has all its bytes");
    for (gains, codes, widths) in parts {
        tiles[gains + row] = next();
        for j in 0..widths.rank() {
            let (width, at) = widths.place(j);
            quant::put(width, &mut tiles[codes + at..], row, next());
        }
    }
}

/// The row that [`take_row`]'s bytes stand for: `d_k` then `d_v` floats, the key in its frame.
pub fn decode_taken(kernels: &Kernels, k: &Basis, v: &Basis, taken: &[u8], out: &mut [f32]) {
    let (out_k, out_v) = out.split_at_mut(k.d);
    let (taken_k, taken_v) = taken.split_at(1 + k.widths.rank());
    for (basis, taken, out) in [(k, taken_k, out_k), (v, taken_v, out_v)] {
        let gain = quant::gain(taken[0]);
        let values: Vec<f32> = taken[1..].iter().enumerate().map(|(j, c)| gain * quant::level(basis.widths.place(j).0, *c)).collect();
        out.copy_from_slice(&basis.mean);
        (kernels.accumulate)(&basis.decode, &values, out);
    }
}
