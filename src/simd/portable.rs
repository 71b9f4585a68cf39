//! What there is to kernels for any target: floats in arrays, codes to levels and products of whole numbers, in Rust that vectorises.
//!
//! Must not know what kernels are made of it.

use super::lanes::{Lanes, EXP, EXP_RANGE, LANES, ROUND};
use super::tiles_float::{to_scores, Unpack};
use super::tiles_whole::{round, Queries, Scores, Sums, Whole};
use crate::layout::quant::{coefficient_bytes, cubic, HALF_1, HALF_2, HALF_3, HALF_4, HALF_5, LEVELS_6, STEP};
use crate::layout::TILE;
use half::f16;
use std::f32::consts::{LN_2, LOG2_E};

/// Eight floats without intrinsics: the compiler makes of it what the target has.
#[derive(Clone, Copy)]
pub struct Plain([f32; 8]);

/// An f16 by its bits, without branches: exponent and mantissa move to their places, then a product moves the exponent to f32's bias and makes
/// subnormal numbers normal; what had the highest exponent gets the highest again.
#[inline(always)]
fn widen(half: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    const INFINITE: u32 = 0x7c00 << 13;
    let bits = u32::from(half & 0x7fff) << 13;
    let number = (f32::from_bits(bits) * BIAS).to_bits();
    let special = if bits >= INFINITE { f32::INFINITY.to_bits() } else { 0 };
    f32::from_bits(number | special | u32::from(half & 0x8000) << 16)
}

impl Lanes for Plain {
    const N: usize = 8;
    const COLUMNS: usize = 1;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Plain([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's contract; an array has no alignment beyond its elements', and the read is unaligned anyway.
        Plain(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_half(p: *const f16) -> Self {
        // SAFETY: the caller's contract.
        let halves = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        let mut out = [0.0; 8];
        for (out, half) in out.iter_mut().zip(halves) {
            *out = widen(half);
        }
        Plain(out)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self {
        // SAFETY: the caller's contract.
        Plain(unsafe { index.cast::<[u8; 8]>().read_unaligned() }.map(|i| table[usize::from(i)]))
    }
    #[inline(always)]
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2] {
        // SAFETY: the caller's contract.
        let bytes = unsafe { p.cast::<[u8; 8]>().read_unaligned() };
        [Plain(bytes.map(|x| table[usize::from(x & 15)])), Plain(bytes.map(|x| table[usize::from(x >> 4)]))]
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for i in 0..8 {
            self.0[i] += a.0[i] * b.0[i];
        }
        self
    }
    #[inline(always)]
    unsafe fn times(mut self, x: Self) -> Self {
        for i in 0..8 {
            self.0[i] *= x.0[i];
        }
        self
    }
    #[inline(always)]
    unsafe fn exp(mut self) -> Self {
        for x in &mut self.0 {
            // Comparisons, unlike `max` and `min`, are one instruction.
            let low = if *x > EXP_RANGE[0] { *x } else { EXP_RANGE[0] };
            let t = if low < EXP_RANGE[1] { low } else { EXP_RANGE[1] } * LOG2_E;
            let rounded = t + ROUND;
            let f = (t - (rounded - ROUND)) * LN_2;
            let p = EXP[1..].iter().fold(EXP[0], |p, c| p * f + c);
            let e = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
            *x = if *x > f32::NEG_INFINITY { e } else { 0.0 };
        }
        self
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // Four by four: what a register of 128 bits holds.
        for (i, j) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
            // SAFETY: the caller's contract.
            unsafe {
                let row = |r: usize| from.add((i + r) * stride + j).cast::<[f32; 4]>().read_unaligned();
                let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
                for k in 0..4 {
                    to.add((j + k) * to_stride + i).cast::<[f32; 4]>().write_unaligned([a[k], b[k], c[k], d[k]]);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self; 4]) -> [f32; 4] {
        v.map(|v| {
            let four: [f32; 4] = std::array::from_fn(|i| v.0[i] + v.0[i + 4]);
            (four[0] + four[2]) + (four[1] + four[3])
        })
    }
}

/// Codes of up to `2 * H` levels, in place, become the levels: `half` has the positive ones, the others are these with their signs changed.
/// Sums of steps between levels, because comparisons of bytes are vectors on every target and table lookups are not.
#[inline(always)]
fn to_levels<const H: usize>(half: [i8; H], codes: &mut [i8; TILE]) {
    for x in codes {
        let above = *x - H as i8;
        // All ones for the lower half, where -1 is the first level from the middle, as 0 is in the upper.
        let sign = above >> 7;
        let place = above ^ sign;
        let mut level = half[0];
        for i in 1..H {
            level += if place >= i as i8 { half[i] - half[i - 1] } else { 0 };
        }
        *x = (level ^ sign) - sign;
    }
}

/// The 64 levels of a packed coefficient of 1 to 5 bits, in units of [`STEP`].
#[inline(always)]
fn unpack_units(width: u32, packed: &[u8]) -> [i8; TILE] {
    let (mut codes, mut rest) = ([0i8; TILE], packed);
    if width & 4 != 0 {
        let (nibbles, later) = rest.split_at(TILE / 2);
        for k in 0..TILE / 2 {
            codes[k] = (nibbles[k] & 15) as i8;
            codes[k + TILE / 2] = (nibbles[k] >> 4) as i8;
        }
        rest = later;
    }
    if width & 2 != 0 {
        let (pairs, later) = rest.split_at(TILE / 4);
        for (group, codes) in codes.chunks_exact_mut(TILE / 4).enumerate() {
            for (code, byte) in codes.iter_mut().zip(pairs) {
                *code = (byte >> (2 * group) & 3) as i8;
            }
        }
        rest = later;
    }
    if width & 1 != 0 {
        // Each byte of the plane is copied to those of its eight rows, which keep a bit each.
        const COPIES: u64 = 0x0101_0101_0101_0101;
        const BITS: u64 = 0x8040_2010_0804_0201;
        let mut set = [0; TILE];
        for (set, byte) in set.chunks_exact_mut(8).zip(rest) {
            set.copy_from_slice(&((u64::from(*byte) * COPIES) & BITS).to_le_bytes());
        }
        for (code, set) in codes.iter_mut().zip(set) {
            *code |= i8::from(set != 0) << (width & 6);
        }
    }
    match width {
        1 => to_levels(HALF_1, &mut codes),
        2 => to_levels(HALF_2, &mut codes),
        3 => to_levels(HALF_3, &mut codes),
        4 => to_levels(HALF_4, &mut codes),
        _ => to_levels(HALF_5, &mut codes),
    }
    codes
}

/// All 64 values of a packed coefficient.
#[inline(always)]
fn unpack(width: u32, packed: &[u8], out: &mut [f32; TILE]) {
    match width {
        6 => {
            for k in 0..32 {
                let high = |row: usize| packed[32 + row % 16] >> (row / 16 * 2) & 3;
                out[k] = LEVELS_6[(packed[k] & 15 | high(k) << 4) as usize];
                out[k + 32] = LEVELS_6[(packed[k] >> 4 | high(k + 32) << 4) as usize];
            }
        }
        8 => {
            for k in 0..64 {
                out[k] = cubic(f32::from(packed[k] as i8));
            }
        }
        _ => {
            let units = unpack_units(width, packed);
            for k in 0..64 {
                out[k] = f32::from(units[k]) * STEP[width as usize];
            }
        }
    }
}

impl Unpack for Plain {
    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
        unpack(WIDTH, packed, out)
    }
}

/// Coefficients of a row that are summed at once; as many as a tile has rows, so that sums over coefficients and over rows are one function.
const BLOCK: usize = TILE;

/// The sum of 64 products. Written out in eights and not inlined: only so does the compiler make one reduction of it, with its best instruction for
/// that (`pmaddwd`, `smlal`). In a loop it goes for four sums at a time, and in view of where the numbers come from for other products.
#[inline(never)]
fn dot(a: &[i16; BLOCK], b: &[i16; BLOCK]) -> i32 {
    let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
    let eight = |i: usize| {
        let four = |i: usize| product(i) + product(i + 1) + product(i + 2) + product(i + 3);
        four(8 * i) + four(8 * i + 4)
    };
    eight(0) + eight(1) + eight(2) + eight(3) + eight(4) + eight(5) + eight(6) + eight(7)
}

/// `out[i] = [a[i], b[i]]`.
#[inline(always)]
fn zip<T: Copy>(a: &[T; TILE], b: &[T; TILE], out: &mut [[T; 2]; TILE]) {
    for i in 0..TILE {
        out[i] = [a[i], b[i]];
    }
}

/// Levels of coefficients become levels of rows.
#[inline(always)]
fn to_rows(levels: &[[u8; TILE]]) -> [[u8; BLOCK]; TILE] {
    let (mut twos, mut fours, mut rows) = ([[[0; 2]; TILE]; 4], [[[[0; 2]; 2]; TILE]; 2], [[0; BLOCK]; TILE]);
    for (i, levels) in levels.as_chunks::<8>().0.iter().enumerate() {
        for (k, two) in twos.iter_mut().enumerate() {
            zip(&levels[2 * k], &levels[2 * k + 1], two);
        }
        for (k, four) in fours.iter_mut().enumerate() {
            zip(&twos[2 * k], &twos[2 * k + 1], four);
        }
        for ((row, low), high) in rows.iter_mut().zip(&fours[0]).zip(&fours[1]) {
            row[8 * i..][..8].copy_from_slice([*low, *high].as_flattened().as_flattened());
        }
    }
    rows
}

/// The levels of a coefficient that begins at byte `at` of each tile. Not inlined: amid other work the compiler forgets how to make vectors of it.
#[inline(never)]
fn to_words<const WIDTH: u32>(tiles: &[&[u8]], at: usize, rows: &mut [[i16; TILE]]) {
    for (row, tile) in rows.iter_mut().zip(tiles) {
        let levels = unpack_units(WIDTH, &tile[at..at + coefficient_bytes(WIDTH)]);
        for (x, level) in row.iter_mut().zip(levels) {
            *x = i16::from(level);
        }
    }
}

fn numbers(bytes: &[u8]) -> &[[i16; BLOCK]] {
    bytemuck::cast_slice::<u8, i16>(bytes).as_chunks().0
}

// SAFETY, for all that is unsafe: plain Rust needs no features, and looks at sizes.
impl Whole for Plain {
    type Float = Plain;
    type Offset = ();
    const NO_OFFSET: () = ();
    const OFFSETS: usize = 0;
    const QUERIES: usize = 8;
    /// As many queries' digits lie in the first cache together.
    const VALUE_QUERIES: usize = 8;
    /// Sums of a block are exact, those of blocks are in f32.
    const MOST: usize = usize::MAX;
    const GROUP: usize = BLOCK;
    const LEVEL_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [u8; TILE]) {
        *out = bytemuck::cast(unpack_units(WIDTH, packed));
    }
    #[inline(always)]
    unsafe fn arrange(levels: &mut [u8]) {
        const BYTES: usize = BLOCK * TILE;
        // Words take twice the room of the bytes that they were: from the last block on, none is overwritten before it is read.
        for block in (0..levels.len() / (2 * BYTES)).rev() {
            let rows = to_rows(levels[block * BYTES..][..BYTES].as_chunks().0);
            let words = bytemuck::cast_slice_mut::<u8, i16>(&mut levels[2 * block * BYTES..][..2 * BYTES]);
            for (word, level) in words.iter_mut().zip(rows.as_flattened()) {
                *word = i16::from(*level as i8);
            }
        }
    }
    #[inline(always)]
    unsafe fn digits(x: &[f32], out: &mut [u8]) -> f32 {
        round(x, bytemuck::cast_slice_mut(out))
    }
    #[inline(always)]
    unsafe fn offsets(_: &[u8], _: &mut Vec<i32>) {}
    #[inline(always)]
    unsafe fn scores(levels: &[u8], queries: Queries, to: Scores) {
        let blocks = queries.padded / BLOCK;
        for (q, out) in to.out.chunks_mut(to.stride).enumerate().take(queries.n) {
            let mut sums = to.wide.map_or([0.0; TILE], |wide| wide.as_chunks().0[q]);
            for (rows, digits) in numbers(levels).chunks_exact(TILE).zip(&numbers(queries.digits)[q * blocks..]) {
                let mut dots = [0; TILE];
                for (sum, row) in dots.iter_mut().zip(rows) {
                    *sum = dot(row, digits);
                }
                for (sum, dot) in sums.iter_mut().zip(dots) {
                    *sum += dot as f32 * queries.scales[q];
                }
            }
            let out = (&mut out[..TILE]).try_into().expect("invariant: the rows of a tile");
            to_scores(&sums, to.pass, to.gains, (to.means[q], to.scale), out, &mut to.largest[q]);
        }
    }
    #[inline(always)]
    unsafe fn row_digits(x: &[f32], out: &mut [u8]) -> (f32, ()) {
        (round(x, bytemuck::cast_slice_mut(out)), ())
    }
    #[inline(always)]
    unsafe fn values<const WIDTH: u32, const C: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Self>) {
        let rows = bytemuck::cast_slice_mut::<u8, i16>(s.levels).as_chunks_mut().0;
        for c in 0..C {
            let at = at + c * coefficient_bytes(WIDTH);
            // Levels of all tiles before all sums: the compiler would make other products of what it knows to be bytes.
            to_words::<WIDTH>(tiles, at, rows);
            let sums = s.out[(j + c) * s.n * LANES..].iter_mut().step_by(LANES).take(s.queries);
            for ((sum, digits), scale) in sums.zip(numbers(s.digits).chunks_exact(tiles.len())).zip(s.scales) {
                // 64 products stay under 2^28, and as many of these as there are tiles are more than 32 bits.
                let total: i64 = rows.iter().zip(digits).map(|(row, digits)| i64::from(dot(row, digits))).sum();
                *sum += total as f32 * (scale * STEP[WIDTH as usize]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::quant::{level, put, WIDTHS};

    #[test]
    fn values_are_the_levels_of_codes() {
        for width in WIDTHS.into_iter().skip(1) {
            for pass in 0..3u32 {
                let mut packed = vec![0xa5; coefficient_bytes(width)];
                let codes: [u8; TILE] = std::array::from_fn(|row| match ((row as u32 * 37 + pass * 11) % (1 << width)) as u8 {
                    128 if width == 8 => 1,
                    code => code,
                });
                codes.iter().enumerate().for_each(|(row, code)| put(width, &mut packed, row, *code));
                let mut values = [0.0; TILE];
                unpack(width, &packed, &mut values);
                for row in 0..TILE {
                    assert!((values[row] - level(width, codes[row])).abs() < 1e-6, "{width} {row}");
                }
            }
        }
    }
}
