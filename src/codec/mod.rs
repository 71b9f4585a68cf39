//! The codec of one head: a mean, a weighted Karhunen-Loeve basis, quantised coefficients and one gain per row.
//!
//! `x ~ mean + gain * sum_j level(code_j) * decode_j`. Basis and bit widths come from [`fit`]; rows are coded in tiles of 64.
//! Keys arrive in their tile's frame. Must not know about sequences, positions or cells.

pub mod bits;
pub mod calibration;
pub mod fit;

use crate::config::{LayerGeometry, ANCHOR_GRID, BANDS, BASIS_HEADER_BYTES, GAIN_BYTES, TILE};
use crate::error::{Error, Result};
use crate::simd::{self, quant, Kernels, MatMut, MatRef, Widths};
use half::f16;
use std::ops::Range;

/// The position whose frame a key lies in, given the middle position of the rows around it.
pub fn anchor(pos: i32) -> i32 {
    pos.div_euclid(ANCHOR_GRID) * ANCHOR_GRID + ANCHOR_GRID / 2
}

/// What is fitted for one head, K or V. Coefficients are in the order of their variance, so each band codes the first few.
#[derive(Debug, Clone, Default)]
pub struct Basis {
    /// Elements of a head.
    pub d: usize,
    /// Coefficients by width, for each band.
    pub widths: [Widths; BANDS],
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

/// What the elements of a row are divided by to be kept in f16: its largest becomes 1, so that no magnitude leaves the range.
fn row_scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0f32, |a, x| a.max(x.abs())).max(f32::MIN_POSITIVE)
}

/// Coefficients of the band that has most.
fn largest_rank(widths: &[Widths; BANDS]) -> usize {
    widths.iter().map(Widths::rank).max().unwrap_or(0)
}

impl Basis {
    /// Widths of a stored basis.
    pub fn widths_of(bytes: &[u8]) -> [Widths; BANDS] {
        let count = |i: usize| usize::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        std::array::from_fn(|band| Widths { counts: std::array::from_fn(|i| count(band * Widths::BITS.len() + i)) })
    }

    /// Coefficients that some band codes.
    pub fn rank(&self) -> usize {
        largest_rank(&self.widths)
    }

    /// Write in stored form: widths, mean, then per coefficient an encode scale, decode scale and weight in f32, then both
    /// matrices in f16, rows divided by their scale.
    pub fn store(&self, bytes: &mut [u8]) {
        let (d, r) = (self.d, self.rank());
        bytes.fill(0);
        for (i, n) in self.widths.iter().flat_map(|w| w.counts).enumerate() {
            bytes[2 * i..2 * i + 2].copy_from_slice(&(n as u16).to_le_bytes());
        }
        let (floats, matrices) = bytes[BASIS_HEADER_BYTES..].split_at_mut(16 * d);
        for (i, m) in self.mean.iter().enumerate() {
            put_f32(floats, i, *m);
        }
        for (part, rows) in [&self.encode, &self.decode].into_iter().enumerate() {
            for (j, row) in rows.chunks_exact(d).enumerate().take(r) {
                let largest = row_scale(row);
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
        let r = self.rank();
        if r > d || bytes.len() < LayerGeometry::basis_bytes_of(d) {
            return Err(Error::Data(format!("a basis of rank {r} for heads of {d} elements in {} bytes", bytes.len())));
        }
        let (floats, matrices) = bytes[BASIS_HEADER_BYTES..].split_at(16 * d);
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
            let stored = f16s(&matrices[from..from + 2 * r * d])?;
            for (j, (row, stored)) in rows.chunks_exact_mut(d).zip(stored.chunks_exact(d)).enumerate() {
                (simd::kernels().widen)(stored, row);
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

/// Where the tiles of one head lie in its bytes, and how many coefficients of which width they have.
#[derive(Debug, Clone)]
pub struct TileMap {
    band_tiles: [usize; BANDS],
    k: [Widths; BANDS],
    v: [Widths; BANDS],
}

/// One tile of a [`TileMap`].
#[derive(Debug, Clone)]
pub struct TilePlace {
    /// Its bytes among those of the head.
    pub bytes: Range<usize>,
    /// Its band.
    pub band: usize,
    /// Widths of K.
    pub k: Widths,
    /// Widths of V.
    pub v: Widths,
}

impl TileMap {
    /// The tiles of a head with stored `bases` of K and V.
    pub fn of(band_tiles: [usize; BANDS], g: &LayerGeometry, bases: &[u8]) -> Self {
        TileMap { band_tiles, k: Basis::widths_of(bases), v: Basis::widths_of(&bases[LayerGeometry::basis_bytes_of(g.d_k)..]) }
    }
    /// True when no band has more coefficients than a head has elements.
    pub fn is_possible(&self, g: &LayerGeometry) -> bool {
        largest_rank(&self.k) <= g.d_k && largest_rank(&self.v) <= g.d_v
    }
    fn tile_bytes(&self, band: usize) -> usize {
        GAIN_BYTES + self.k[band].bytes() + self.v[band].bytes()
    }
    /// Bytes of all tiles.
    pub fn bytes(&self) -> usize {
        (0..BANDS).map(|b| self.band_tiles[b] * self.tile_bytes(b)).sum()
    }
    /// Where a tile is.
    pub fn place(&self, tile: usize) -> TilePlace {
        let (mut left, mut at, mut band) = (tile, 0, 0);
        while band + 1 < BANDS && left >= self.band_tiles[band] {
            left -= self.band_tiles[band];
            at += self.band_tiles[band] * self.tile_bytes(band);
            band += 1;
        }
        let size = self.tile_bytes(band);
        TilePlace { bytes: at + left * size..at + (left + 1) * size, band, k: self.k[band], v: self.v[band] }
    }
    /// Bytes of a row of `band` as [`take_row`] gives it.
    pub fn taken_bytes(&self, band: usize) -> usize {
        2 + self.k[band].rank() + self.v[band].rank()
    }
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

/// Code one row of `d` elements as row `row` of a tile of `band`.
///
/// Coefficients are divided by their common magnitude and quantised, the gain is chosen by weighted least squares, and the
/// coefficients are quantised again for it.
#[expect(clippy::too_many_arguments, reason = "a row, what codes it and where it goes")]
pub fn encode_row(kernels: &Kernels, basis: &Basis, band: usize, x: &[f32], row: usize, gains: &mut [u8], codes: &mut [u8], scratch: &mut Vec<f32>) {
    let (d, r) = (basis.d, basis.widths[band].rank());
    scratch.clear();
    scratch.resize(d + r, 0.0);
    let (centred, z) = scratch.split_at_mut(d);
    for ((c, x), m) in centred.iter_mut().zip(x).zip(&basis.mean) {
        *c = x - m;
    }
    (kernels.dots)(MatRef::new(centred, d), MatRef::new(&basis.encode, d), MatMut::new(z, r.max(1)), 1, d, r);
    quantise_row(basis, band, z, row, gains, codes);
}

fn quantise_row(basis: &Basis, band: usize, z: &[f32], row: usize, gains: &mut [u8], codes: &mut [u8]) {
    let widths = basis.widths[band];
    let power = z.iter().map(|z| z * z).sum::<f32>() / z.len().max(1) as f32;
    let scale = power.sqrt().max(1e-6);
    let (mut zo, mut oo) = (0.0f64, 0.0f64);
    for (j, z) in z.iter().enumerate() {
        let (width, _) = widths.place(j);
        let (o, w) = (f64::from(quant::level(width, quant::code(width, z / scale))), f64::from(basis.weight[j]));
        zo += f64::from(*z) * o * w;
        oo += o * o * w;
    }
    gains[row] = quant::gain_code(if oo > 0.0 { (zo / oo) as f32 } else { 0.0 });
    // The codes are chosen for the gain as it is stored: what a byte cannot say of the gain would move all scores of the row
    // together, and at fine rates be the larger part of the error.
    let gain = quant::gain(gains[row]);
    let divisor = if gain > 0.0 { gain } else { scale };
    for (j, z) in z.iter().enumerate() {
        let (width, at) = widths.place(j);
        quant::put(width, &mut codes[at..], row, quant::code(width, z / divisor));
    }
}

/// Code the rows of a tile again for another band, from what `from` holds. `bases` are those of K and V.
pub fn recode_tile(bases: (&Basis, &Basis), map: &TileMap, tiles: &mut [u8], from: usize, to: usize) {
    let (from, to) = (map.place(from), map.place(to));
    let source = tiles[from.bytes.clone()].to_vec();
    let target = split_tile_mut(&mut tiles[to.bytes.clone()], to.k);
    let mut z = Vec::new();
    for ((basis, (old_gains, old_codes)), (gains, codes)) in [bases.0, bases.1].into_iter().zip(split_tile(&source, from.k)).zip(target) {
        let (old, new) = (basis.widths[from.band], basis.widths[to.band].rank());
        let mut values = vec![[0.0f32; TILE]; new];
        (simd::kernels().unpack)(old, old_codes, &mut values);
        for row in 0..TILE {
            let gain = quant::gain(old_gains[row]);
            z.clear();
            z.extend(values.iter().map(|v| gain * v[row]));
            quantise_row(basis, to.band, &z, row, gains, codes);
        }
    }
}

/// Rebuild the rows of a tile of `band` that `wanted` has a bit for: `out[row] = mean + gain * coefficients`, `d` elements a row.
#[expect(clippy::too_many_arguments, reason = "a tile, what codes it and where its rows go")]
pub fn decode_rows(kernels: &Kernels, basis: &Basis, band: usize, gains: &[u8], codes: &[u8], wanted: u64, out: &mut [f32], scratch: &mut Vec<f32>) {
    let (d, widths) = (basis.d, basis.widths[band]);
    let r = widths.rank();
    scratch.clear();
    scratch.resize(r * TILE + r, 0.0);
    let (values, row_values) = scratch.split_at_mut(r * TILE);
    (kernels.unpack)(widths, codes, values.as_chunks_mut().0);
    for (row, out) in out.chunks_exact_mut(d).enumerate().take(TILE).filter(|(row, _)| wanted >> row & 1 == 1) {
        let gain = quant::gain(gains[row]);
        for (v, rv) in values.chunks_exact(TILE).zip(row_values.iter_mut()) {
            *rv = v[row] * gain;
        }
        out.copy_from_slice(&basis.mean);
        (kernels.accumulate)(&basis.decode, row_values, out);
    }
}

/// Gain and coefficient offsets of row `row`, counted over all tiles: K then V.
fn row_parts(map: &TileMap, row: usize) -> ([(usize, usize, Widths); 2], usize) {
    let p = map.place(row / TILE);
    let at = p.bytes.start;
    ([(at, at + GAIN_BYTES, p.k), (at + TILE, at + GAIN_BYTES + p.k.bytes(), p.v)], row % TILE)
}

/// One head's gains and codes of row `row` (counted over all tiles), a byte each: K gain, K codes, V gain, V codes.
pub fn take_row(map: &TileMap, tiles: &[u8], row: usize) -> Vec<u8> {
    let (parts, row) = row_parts(map, row);
    let mut out = Vec::new();
    for (gains, codes, widths) in parts {
        out.push(tiles[gains + row]);
        out.extend((0..widths.rank()).map(|j| {
            let (width, at) = widths.place(j);
            quant::get(width, &tiles[codes + at..], row)
        }));
    }
    out
}

/// Write what [`take_row`] gave for a row of the same band to row `row`.
pub fn put_row(map: &TileMap, tiles: &mut [u8], row: usize, taken: &[u8]) {
    let (parts, row) = row_parts(map, row);
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

/// The row of `band` that [`take_row`]'s bytes stand for: `d_k` then `d_v` floats, the key in its frame.
pub fn decode_taken(kernels: &Kernels, k: &Basis, v: &Basis, band: usize, taken: &[u8], out: &mut [f32]) {
    let (out_k, out_v) = out.split_at_mut(k.d);
    let (taken_k, taken_v) = taken.split_at(1 + k.widths[band].rank());
    for (basis, taken, out) in [(k, taken_k, out_k), (v, taken_v, out_v)] {
        let gain = quant::gain(taken[0]);
        let values: Vec<f32> = taken[1..].iter().enumerate().map(|(j, c)| gain * quant::level(basis.widths[band].place(j).0, *c)).collect();
        out.copy_from_slice(&basis.mean);
        (kernels.accumulate)(&basis.decode, &values, out);
    }
}
