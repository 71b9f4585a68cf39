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
use half::slice::HalfFloatSliceExt;
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
        let (mut scaled, mut halves) = (Vec::with_capacity(d), vec![f16::ZERO; d]);
        for (part, rows) in [&self.encode, &self.decode].into_iter().enumerate() {
            for (j, row) in rows.chunks_exact(d).enumerate().take(r) {
                let largest = row_scale(row);
                put_f32(floats, (1 + part) * d + j, largest);
                let at = 2 * d * (part * d + j);
                scaled.clear();
                scaled.extend(row.iter().map(|x| x / largest));
                halves.convert_from_f32_slice(&scaled);
                matrices[at..at + 2 * d].copy_from_slice(bytemuck::cast_slice(&halves));
            }
        }
        for (j, w) in self.weight.iter().enumerate().take(r) {
            put_f32(floats, 3 * d + j, *w);
        }
    }

    /// Read the stored form of a basis for heads of `d` elements, reusing this object's buffers.
    /// `with_encoder` false leaves out what only coding needs.
    pub fn load(&mut self, bytes: &[u8], d: usize, with_encoder: bool) -> Result<()> {
        self.read(bytes, d, with_encoder, true)
    }

    /// [`Basis::load`] of what coding needs, and no more.
    pub fn load_encoder(&mut self, bytes: &[u8], d: usize) -> Result<()> {
        self.read(bytes, d, true, false)
    }

    fn read(&mut self, bytes: &[u8], d: usize, with_encoder: bool, with_decoder: bool) -> Result<()> {
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
        if with_encoder {
            self.weight.extend((0..r).map(|j| f32_at(floats, 3 * d + j)));
        }
        for (part, rows) in [&mut self.encode, &mut self.decode].into_iter().enumerate() {
            if ![with_encoder, with_decoder][part] {
                rows.clear();
                continue;
            }
            rows.resize(r * d, 0.0);
            let from = 2 * d * part * d;
            let stored = f16s(&matrices[from..from + 2 * r * d])?;
            for (j, (row, stored)) in rows.chunks_exact_mut(d).zip(stored.chunks_exact(d)).enumerate() {
                (simd::kernels().widen)(stored, f32_at(floats, (1 + part) * d + j), row);
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

/// Code one row of `d` elements as row `row` of a tile of `band`, as [`encode_tile`] does with all rows of one.
#[expect(clippy::too_many_arguments, reason = "a row, what codes it and where it goes")]
pub fn encode_row(kernels: &Kernels, basis: &Basis, band: usize, x: &[f32], row: usize, gains: &mut [u8], codes: &mut [u8], scratch: &mut Vec<f32>) {
    let (d, widths) = (basis.d, basis.widths[band]);
    let r = widths.rank();
    scratch.clear();
    scratch.resize(d + r, 0.0);
    let (centred, z) = scratch.split_at_mut(d);
    for ((c, x), m) in centred.iter_mut().zip(x).zip(&basis.mean) {
        *c = x - m;
    }
    (kernels.dots)(MatRef::new(centred, d), MatRef::new(&basis.encode, d), MatMut::new(z, r.max(1)), 1, d, r);
    let power = z.iter().map(|z| z * z).sum::<f32>() / r.max(1) as f32;
    let scale = power.sqrt().max(1e-6);
    let (mut zo, mut oo) = (0.0f32, 0.0f32);
    for ((j, z), weight) in z.iter().enumerate().zip(&basis.weight) {
        let (width, _) = widths.place(j);
        let o = quant::level(width, quant::code(width, z / scale));
        zo += weight * z * o;
        oo += weight * o * o;
    }
    gains[row] = quant::gain_code(if oo > 0.0 { zo / oo } else { 0.0 });
    let gain = quant::gain(gains[row]);
    let divisor = if gain > 0.0 { gain } else { scale };
    for (j, z) in z.iter().enumerate() {
        let (width, at) = widths.place(j);
        quant::put(width, &mut codes[at..], row, quant::code(width, z / divisor));
    }
}

/// Memory to code tiles in.
#[derive(Debug, Default)]
pub struct TileWork {
    /// Coefficients of the rows.
    z: Vec<[f32; TILE]>,
    /// The rows less their mean, transposed.
    columns: Vec<[f32; TILE]>,
}

/// Code the rows of a tile of `band`, `d` elements each.
pub fn encode_tile(kernels: &Kernels, basis: &Basis, band: usize, rows: &[f32], gains: &mut [u8], codes: &mut [u8], work: &mut TileWork) {
    const BLOCK: usize = 16;
    let (d, widths) = (basis.d, basis.widths[band]);
    let r = widths.rank();
    work.columns.resize(d, [0.0; TILE]);
    for (from, rows) in rows.chunks_exact(BLOCK * d).enumerate() {
        for ((i, column), mean) in work.columns.iter_mut().enumerate().zip(&basis.mean) {
            for (out, row) in column[from * BLOCK..(from + 1) * BLOCK].iter_mut().zip(rows.chunks_exact(d)) {
                *out = row[i] - mean;
            }
        }
    }
    work.z.clear();
    work.z.resize(r, [0.0; TILE]);
    let (columns, z) = (MatRef::new(work.columns.as_flattened(), TILE), MatMut::new(work.z.as_flattened_mut(), TILE));
    (kernels.multiply)(MatRef::new(&basis.encode, d), columns, z, r, d, TILE);
    (kernels.quantise)(widths, &basis.weight[..r], &work.z, gains, codes);
}

/// Code the rows of a tile again for another band, from what `from` holds. `bases` are those of K and V.
pub fn recode_tile(kernels: &Kernels, bases: (&Basis, &Basis), map: &TileMap, tiles: &mut [u8], (from, to): (usize, usize), work: &mut TileWork) {
    let z = &mut work.z;
    let (from, to) = (map.place(from), map.place(to));
    let (first, second) = tiles.split_at_mut(from.bytes.start.max(to.bytes.start));
    // Two tiles: the one that begins later begins at the cut.
    let (source, target) = match from.bytes.start < to.bytes.start {
        true => (&first[from.bytes], &mut second[..to.bytes.len()]),
        false => (&second[..from.bytes.len()], &mut first[to.bytes]),
    };
    for ((basis, (old_gains, old_codes)), (gains, codes)) in
        [bases.0, bases.1].into_iter().zip(split_tile(source, from.k)).zip(split_tile_mut(target, to.k))
    {
        let widths = basis.widths[to.band];
        z.resize(widths.rank(), [0.0; TILE]);
        (kernels.unpack)(basis.widths[from.band], old_codes, z);
        let old: [f32; TILE] = std::array::from_fn(|row| quant::gains()[usize::from(old_gains[row])]);
        for z in z.iter_mut() {
            z.iter_mut().zip(&old).for_each(|(z, gain)| *z *= gain);
        }
        (kernels.quantise)(widths, &basis.weight[..widths.rank()], z, gains, codes);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_coded_as_its_rows_are_and_again_from_its_codes() {
        let (d, counts) = (20, [2, 3, 2, 4, 2, 3, 1]);
        let noise = |seed: usize, n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) as f32).sin()).collect() };
        let coarse = Widths { counts: [0, 1, 1, 2, 2, 2, 3] };
        let basis = Basis {
            d,
            widths: [Widths { counts }, coarse, coarse],
            mean: noise(1, d),
            encode: noise(2, 17 * d),
            decode: noise(3, 17 * d),
            weight: noise(4, 17).iter().map(|x| x.abs()).collect(),
        };
        let (kernels, rows) = (simd::kernels(), noise(5, TILE * d));
        let g = LayerGeometry::heads(&crate::config::LayerShape { n_head: 1, n_head_kv: 1, d_k: d as u32, d_v: d as u32 });
        let size = LayerGeometry::basis_bytes_of(d);
        let mut bases = vec![0; 2 * size];
        bases.chunks_exact_mut(size).for_each(|b| basis.store(b));
        let map = TileMap::of([2, 1, 0], &g, &bases);
        assert!(map.is_possible(&g));
        let (mut tiles, mut work) = (vec![0xa5; map.bytes()], TileWork::default());
        for (tile, whole) in [(0, true), (1, false)] {
            let place = map.place(tile);
            for (gains, codes) in split_tile_mut(&mut tiles[place.bytes], place.k) {
                if whole {
                    encode_tile(kernels, &basis, 0, &rows, gains, codes, &mut work);
                } else {
                    rows.chunks_exact(d).enumerate().for_each(|(i, x)| encode_row(kernels, &basis, 0, x, i, gains, codes, &mut vec![]));
                }
            }
        }
        // Rounding may choose another of two levels that are equally near.
        let rows_of = |tiles: &[u8], tile: usize| (0..TILE).flat_map(|row| take_row(&map, tiles, tile * TILE + row)).collect::<Vec<u8>>();
        let (whole, single) = (rows_of(&tiles, 0), rows_of(&tiles, 1));
        let other = whole.iter().zip(&single).filter(|(a, b)| a != b).count();
        assert!(other * 500 < whole.len(), "{other} of {}", whole.len());

        recode_tile(kernels, (&basis, &basis), &map, &mut tiles, (0, 2), &mut work);
        for row in 0..TILE {
            let (fine, coded) = (take_row(&map, &tiles, row), take_row(&map, &tiles, 2 * TILE + row));
            let z: Vec<f32> = (0..coarse.rank()).map(|j| quant::gain(fine[0]) * quant::level(basis.widths[0].place(j).0, fine[1 + j])).collect();
            let gain = quant::gain(coded[0]);
            for (j, z) in z.iter().enumerate() {
                let width = coarse.place(j).0;
                let error = |code: u8| (z - gain * quant::level(width, code)).abs();
                assert!(error(coded[1 + j]) <= error(quant::code(width, z / gain)) + 1e-5 * z.abs(), "row {row}, coefficient {j}");
            }
        }
    }
}
