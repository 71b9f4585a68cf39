//! What there is to kernels with NEON and its dot products of bytes (FEAT_DotProd).
//!
//! Products of levels and factors: 16 of signed bytes, four to a lane, are one instruction, so levels need nothing added, and the other factor is cut
//! into two digits of base 256. Instructions whose intrinsics are not stable, or were not in the oldest Rust that will do, have a function of
//! assembly each. Must not know what kernels are made of it.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::lanes::{Lanes, EXP, EXP_RANGE, LANES, ROUND};
use super::tiles_float::Unpack;
use super::tiles_whole::{round, table, Queries, Scores, Sums, Whole};
use crate::layout::quant::{self, coefficient_bytes, A_8, B_8, LEVELS_6, STEP};
use crate::layout::TILE;
use half::f16;
use std::arch::aarch64::*;
use std::arch::asm;
use std::f32::consts::{LN_2, LOG2_E};

/// NEON, which every aarch64 has, and for [`Whole`] its dot products.
#[derive(Clone, Copy)]
pub struct Neon(float32x4_t);

/// `vcvt_f32_f16`.
#[inline(always)]
fn widen(x: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: NEON is in the target's baseline; the instruction reads a register and writes another.
    unsafe { asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) x, options(pure, nomem, nostack)) }
    out
}

/// `vdotq_s32`: to each lane of `sum` go the products of its four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: this function is compiled for the feature; the instruction reads registers and writes one.
    unsafe { asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack, preserves_flags)) }
    sum
}

/// `vdotq_lane_s32`: the same with the four bytes of one lane of `b` for all.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_lane<const LANE: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x8_t) -> int32x4_t {
    // SAFETY: as in `dot`; the lane is one that `b` has.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) sum, in(vreg) a, in(vreg) b, const LANE,
            options(pure, nomem, nostack, preserves_flags)
        )
    }
    sum
}

// SAFETY, for all: the trait's contract; intrinsics have no other conditions than features and what pointers cover.
impl Lanes for Neon {
    const N: usize = 4;
    const COLUMNS: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Neon(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        Neon(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn load_half(p: *const f16) -> Self {
        // SAFETY: see above.
        Neon(widen(unsafe { vld1_u16(p.cast()) }))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self {
        // SAFETY: see above.
        unsafe {
            let found = index.cast::<[u8; 4]>().read_unaligned().map(|i| table[usize::from(i)]);
            Neon(vld1q_f32(found.as_ptr()))
        }
    }
    #[inline(always)]
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2] {
        // SAFETY: see above; a float of the table has four bytes, and every index is of one of its 64.
        unsafe {
            let part = |i: usize| vld1q_u8(table.as_ptr().add(4 * i).cast());
            let table = uint8x16x4_t(part(0), part(1), part(2), part(3));
            let x = vreinterpretq_u8_u32(vdupq_n_u32(p.cast::<u32>().read_unaligned()));
            let x = vzip1q_u8(x, x);
            // Each byte comes to the four of its float.
            let x = vzip1q_u8(x, x);
            let places = vreinterpretq_u8_u32(vdupq_n_u32(0x03_02_01_00));
            let found = |code: uint8x16_t| Neon(vreinterpretq_f32_u8(vqtbl4q_u8(table, vorrq_u8(vshlq_n_u8::<2>(code), places))));
            [found(vandq_u8(x, vdupq_n_u8(15))), found(vshrq_n_u8::<4>(x))]
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Neon(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[inline(always)]
    unsafe fn times(self, x: Self) -> Self {
        // SAFETY: see above.
        Neon(unsafe { vmulq_f32(self.0, x.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = vminq_f32(vmaxq_f32(self.0, vdupq_n_f32(EXP_RANGE[0])), vdupq_n_f32(EXP_RANGE[1]));
            let t = vmulq_f32(x, vdupq_n_f32(LOG2_E));
            let rounded = vaddq_f32(t, vdupq_n_f32(ROUND));
            let f = vmulq_f32(vsubq_f32(t, vsubq_f32(rounded, vdupq_n_f32(ROUND))), vdupq_n_f32(LN_2));
            let mut p = vdupq_n_f32(EXP[0]);
            for c in &EXP[1..] {
                p = vfmaq_f32(vdupq_n_f32(*c), p, f);
            }
            let e = vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32::<23>(vreinterpretq_u32_f32(rounded)));
            Neon(vreinterpretq_f32_u32(vandq_u32(e, vcgtq_f32(self.0, vdupq_n_f32(f32::NEG_INFINITY)))))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: see above.
        unsafe {
            let mut pairs = [vdupq_n_f64(0.0); 4];
            for i in 0..2 {
                let (a, b) = (vld1q_f32(from.add(2 * i * stride)), vld1q_f32(from.add((2 * i + 1) * stride)));
                // Even columns of two rows, then odd ones.
                pairs[i] = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
                pairs[i + 2] = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
            }
            for i in 0..2 {
                vst1q_f32(to.add(i * to_stride), vreinterpretq_f32_f64(vtrn1q_f64(pairs[2 * i], pairs[2 * i + 1])));
                vst1q_f32(to.add((i + 2) * to_stride), vreinterpretq_f32_f64(vtrn2q_f64(pairs[2 * i], pairs[2 * i + 1])));
            }
        }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: see above; both types are four floats.
        unsafe { std::mem::transmute::<float32x4_t, [f32; 4]>(vpaddq_f32(vpaddq_f32(v[0].0, v[1].0), vpaddq_f32(v[2].0, v[3].0))) }
    }
}

// Levels by code. Those of 2 and 3 bits are repeated: in the low four of an index, anything may stand above its own bits.
static TABLE_2: [u8; 16] = table(&quant::UNITS_2, 0, 4, 0);
static TABLE_3: [u8; 16] = table(&quant::UNITS_3, 0, 8, 0);
static TABLE_4: [u8; 16] = table(&quant::UNITS_4, 0, 16, 0);
static TABLE_5: [[u8; 16]; 2] = [table(&quant::UNITS_5, 0, 16, 0), table(&quant::UNITS_5, 16, 16, 0)];

/// Two bits of each row from a plane of 16 bytes, 16 rows a vector; above them may be two others.
#[inline(always)]
unsafe fn pairs(p: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: the caller's features, and 16 bytes at `p`.
    unsafe {
        let (x, mask) = (vld1q_u8(p), vdupq_n_u8(15));
        [vandq_u8(x, mask), vandq_u8(vshrq_n_u8::<2>(x), mask), vshrq_n_u8::<4>(x), vshrq_n_u8::<6>(x)]
    }
}

/// Four bits of each row from a plane of 32 bytes, 16 rows a vector.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: the caller's features, and 32 bytes at `p`.
    unsafe {
        let (x, y, mask) = (vld1q_u8(p), vld1q_u8(p.add(16)), vdupq_n_u8(15));
        [vandq_u8(x, mask), vandq_u8(y, mask), vshrq_n_u8::<4>(x), vshrq_n_u8::<4>(y)]
    }
}

/// All ones in the bytes of the rows whose bit is set in a plane of 8 bytes, 16 rows a vector.
#[inline(always)]
unsafe fn is_set(p: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: the caller's features, and 8 bytes at `p`.
    unsafe {
        // Each byte comes to its eight rows.
        let x = vld1_u8(p);
        let twice = vcombine_u8(vzip1_u8(x, x), vzip2_u8(x, x));
        let (a, b) = (vzip1q_u8(twice, twice), vzip2q_u8(twice, twice));
        let bits = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
        let set = |copies: uint8x16_t| vtstq_u8(copies, bits);
        [set(vzip1q_u8(a, a)), set(vzip2q_u8(a, a)), set(vzip1q_u8(b, b)), set(vzip2q_u8(b, b))]
    }
}

/// Levels of a packed coefficient, 16 rows a vector.
#[inline(always)]
unsafe fn bytes<const WIDTH: u32>(p: *const u8) -> [int8x16_t; 4] {
    // SAFETY: the caller's features, and the planes of a coefficient of `WIDTH` bits at `p`.
    unsafe {
        let load = |t: &[u8; 16]| vld1q_u8(t.as_ptr());
        let low = match WIDTH {
            1 => [vdupq_n_u8(0); 4],
            2 | 3 => pairs(p),
            _ => nibbles(p),
        };
        let set = match WIDTH {
            1 | 3 | 5 => is_set(p.add(coefficient_bytes(WIDTH - 1))),
            _ => [vdupq_n_u8(0); 4],
        };
        let mut out = [vdupq_n_s8(0); 4];
        for i in 0..4 {
            out[i] = match WIDTH {
                1 => vbslq_s8(set[i], vdupq_n_s8(quant::UNITS_1[1]), vdupq_n_s8(quant::UNITS_1[0])),
                2 => vreinterpretq_s8_u8(vqtbl1q_u8(load(&TABLE_2), low[i])),
                3 => vreinterpretq_s8_u8(vqtbl1q_u8(load(&TABLE_3), vbslq_u8(vdupq_n_u8(4), set[i], low[i]))),
                4 => vreinterpretq_s8_u8(vqtbl1q_u8(load(&TABLE_4), low[i])),
                _ => {
                    let both = uint8x16x2_t(load(&TABLE_5[0]), load(&TABLE_5[1]));
                    vreinterpretq_s8_u8(vqtbl2q_u8(both, vbslq_u8(vdupq_n_u8(16), set[i], low[i])))
                }
            };
        }
        out
    }
}

/// 16 bytes as floats.
#[inline(always)]
unsafe fn floats(x: int8x16_t) -> [float32x4_t; 4] {
    // SAFETY: the caller's features.
    unsafe {
        let words = [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)];
        let mut out = [vdupq_n_f32(0.0); 4];
        for i in 0..2 {
            out[2 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[i])));
            out[2 * i + 1] = vcvtq_f32_s32(vmovl_high_s16(words[i]));
        }
        out
    }
}

impl Unpack for Neon {
    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
        let (p, to) = (packed.as_ptr(), out.as_mut_ptr());
        // SAFETY: the trait's contract: `p` has the planes of `WIDTH`, and a vector of `out` is one of four for each of 16 rows.
        unsafe {
            match WIDTH {
                6 => {
                    let (low, high) = (nibbles(p), pairs(p.add(coefficient_bytes(4))));
                    let mut codes = [0u8; TILE];
                    for i in 0..4 {
                        let code = vandq_u8(vorrq_u8(low[i], vshlq_n_u8::<4>(high[i])), vdupq_n_u8(63));
                        vst1q_u8(codes.as_mut_ptr().add(16 * i), code);
                    }
                    for (out, code) in out.iter_mut().zip(codes) {
                        *out = LEVELS_6[usize::from(code)];
                    }
                }
                8 => {
                    for i in 0..4 {
                        for (k, c) in floats(vld1q_s8(p.add(16 * i).cast())).into_iter().enumerate() {
                            let slope = vfmaq_f32(vdupq_n_f32(A_8), vmulq_f32(c, c), vdupq_n_f32(B_8));
                            vst1q_f32(to.add(16 * i + 4 * k), vmulq_f32(c, slope));
                        }
                    }
                }
                _ => {
                    for (i, levels) in bytes::<WIDTH>(p).into_iter().enumerate() {
                        for (k, units) in floats(levels).into_iter().enumerate() {
                            vst1q_f32(to.add(16 * i + 4 * k), vmulq_f32(units, vdupq_n_f32(STEP[WIDTH as usize])));
                        }
                    }
                }
            }
        }
    }
}

/// Digits of base 256 of a factor, the lowest first.
const DIGITS: usize = 2;

/// The number that sums over each digit stand for, times `scale`, and `before`.
#[inline(always)]
unsafe fn join(sums: [int32x4_t; DIGITS], scale: f32, before: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's features.
    unsafe {
        let (low, high) = (vcvtq_f32_s32(sums[0]), vcvtq_f32_s32(sums[1]));
        vfmaq_f32(before, vfmaq_f32(low, high, vdupq_n_f32(256.0)), vdupq_n_f32(scale))
    }
}

/// Four coefficients of 64 rows become rows of four, in order.
#[inline(always)]
unsafe fn interleave(four: *mut u8) {
    // SAFETY: the caller's features, and four coefficients' bytes.
    unsafe {
        let mut c = [[vdupq_n_u8(0); 4]; 4];
        for k in 0..4 {
            for i in 0..4 {
                c[k][i] = vld1q_u8(four.add(k * TILE + 16 * i));
            }
        }
        for i in 0..4 {
            for h in 0..2 {
                // Eight rows of two coefficients, of the first two and the others.
                let two = |a: uint8x16_t, b: uint8x16_t| vreinterpretq_u16_u8(if h == 0 { vzip1q_u8(a, b) } else { vzip2q_u8(a, b) });
                let (x, y) = (two(c[0][i], c[1][i]), two(c[2][i], c[3][i]));
                let to = four.add(64 * i + 32 * h);
                vst1q_u8(to, vreinterpretq_u8_u16(vzip1q_u16(x, y)));
                vst1q_u8(to.add(16), vreinterpretq_u8_u16(vzip2q_u16(x, y)));
            }
        }
    }
}

/// Scores of `Q` queries, `V` vectors of four rows at a time: their sums stay in registers, and are enough to keep the processor busy.
#[inline(always)]
unsafe fn scores<const Q: usize, const V: usize>(rows: &[u8], queries: Queries, s: Scores) {
    let Queries { digits, padded, scales, .. } = queries;
    let parts = TILE / (4 * V);
    // SAFETY: the caller's: what is lent covers all queries.
    unsafe {
        let mut largest = [vdupq_n_f32(0.0); Q];
        for q in 0..Q {
            largest[q] = vld1q_f32(s.largest[q].as_ptr());
        }
        for part in 0..parts {
            let mut acc = [[[vdupq_n_s32(0); V]; DIGITS]; Q];
            for (i, four) in rows.chunks_exact(4 * TILE).enumerate() {
                // One line for every four coefficients, in all parts together.
                s.ahead.fetch(usize::from(i % parts == part));
                let mut levels = [vdupq_n_s8(0); V];
                for v in 0..V {
                    levels[v] = vld1q_s8(four.as_ptr().add(16 * (V * part + v)).cast());
                }
                for q in 0..Q {
                    let z = vld1_s8(digits.as_ptr().add((q * padded + 4 * i) * DIGITS).cast());
                    for v in 0..V {
                        acc[q][0][v] = dot_lane::<0>(acc[q][0][v], levels[v], z);
                        acc[q][1][v] = dot_lane::<1>(acc[q][1][v], levels[v], z);
                    }
                }
            }
            for q in 0..Q {
                for v in 0..V {
                    let row = 4 * (V * part + v);
                    let out = s.out.as_mut_ptr().add(q * s.stride + row);
                    let wide = s.wide.map_or(vdupq_n_f32(0.0), |wide| vld1q_f32(wide.as_ptr().add(q * TILE + row)));
                    let x = join([acc[q][0][v], acc[q][1][v]], scales[q], wide);
                    let before = if s.pass.add { vld1q_f32(out) } else { vdupq_n_f32(0.0) };
                    let mut x = vfmaq_f32(before, x, vld1q_f32(s.gains.as_ptr().add(row)));
                    if s.pass.finish {
                        x = vmulq_f32(vaddq_f32(x, vdupq_n_f32(s.means[q])), vdupq_n_f32(s.scale));
                        largest[q] = vmaxq_f32(largest[q], x);
                    }
                    vst1q_f32(out, x);
                }
            }
        }
        for q in 0..Q {
            vst1q_f32(s.largest[q].as_mut_ptr(), largest[q]);
        }
    }
}

/// Add the products of rows `16 I` to `16 I + 15` of a tile, whose digits begin at `p`; those of a query have `length` rows.
#[inline(always)]
unsafe fn add_rows<const I: usize, const C: usize, const Q: usize>(
    acc: &mut [[[int32x4_t; C]; DIGITS]; Q],
    levels: &[[int8x16_t; 4]; C],
    p: *const i8,
    length: usize,
) {
    for q in 0..Q {
        for d in 0..DIGITS {
            // SAFETY: the caller's features, and digits of `Q` queries.
            unsafe {
                let x = vld1q_s8(p.add((q * length + 16 * I) * DIGITS + 16 * d));
                for c in 0..C {
                    acc[q][d][c] = dot(acc[q][d][c], levels[c][I], x);
                }
            }
        }
    }
}

/// Sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile. They are in four of the lanes of each; the others
/// stay as they are.
#[inline(always)]
unsafe fn value_block<const WIDTH: u32, const C: usize, const Q: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Neon>) {
    // SAFETY: the caller's: what is lent covers all queries.
    unsafe {
        let mut acc = [[[vdupq_n_s32(0); C]; DIGITS]; Q];
        let (mut p, length) = (s.digits.as_ptr().cast::<i8>(), tiles.len() * TILE);
        for tile in tiles {
            s.ahead.fetch(1);
            let mut levels = [[vdupq_n_s8(0); 4]; C];
            for c in 0..C {
                levels[c] = bytes::<WIDTH>(tile.as_ptr().add(at + c * coefficient_bytes(WIDTH)));
            }
            // Not a loop, which the compiler would leave one, with levels in memory.
            add_rows::<0, C, Q>(&mut acc, &levels, p, length);
            add_rows::<1, C, Q>(&mut acc, &levels, p, length);
            add_rows::<2, C, Q>(&mut acc, &levels, p, length);
            add_rows::<3, C, Q>(&mut acc, &levels, p, length);
            p = p.add(TILE * DIGITS);
        }
        for c in 0..C {
            for q in 0..Q {
                let out = s.out.as_mut_ptr().add(((j + c) * s.n + q) * LANES);
                vst1q_f32(out, join([acc[q][0][c], acc[q][1][c]], s.scales[q] * STEP[WIDTH as usize], vld1q_f32(out)));
            }
        }
    }
}

// SAFETY, for all that is unsafe: the trait's contract.
impl Whole for Neon {
    type Float = Neon;
    type Offset = ();
    const NO_OFFSET: () = ();
    const OFFSETS: usize = 0;
    /// Queries whose sums are in registers together, with those of eight rows or of two coefficients.
    const QUERIES: usize = 4;
    const VALUE_QUERIES: usize = 4;
    /// Digits are of 8 bits.
    const MOST: usize = usize::MAX;
    const GROUP: usize = 4;
    const LEVEL_BYTES: usize = 1;

    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [u8; TILE]) {
        // SAFETY: see above.
        unsafe {
            for (i, x) in bytes::<WIDTH>(packed.as_ptr()).into_iter().enumerate() {
                vst1q_s8(out.as_mut_ptr().add(16 * i).cast(), x);
            }
        }
    }
    #[inline(always)]
    unsafe fn arrange(levels: &mut [u8]) {
        for four in levels.chunks_exact_mut(4 * TILE) {
            // SAFETY: see above.
            unsafe { interleave(four.as_mut_ptr()) }
        }
    }
    /// The low digits of every four coefficients, then their high ones.
    #[inline(always)]
    unsafe fn digits(x: &[f32], out: &mut [u8]) -> f32 {
        let numbers = bytemuck::cast_slice_mut(out);
        let unit = round(x, numbers);
        for numbers in numbers.chunks_exact_mut(8) {
            // SAFETY: see above; pieces have eight numbers.
            unsafe {
                let x = vld1q_s16(numbers.as_ptr());
                // A low digit is from -128 to 127, so the high one is rounded.
                let (low, high) = (vreinterpret_s32_s8(vmovn_s16(x)), vreinterpret_s32_s8(vrshrn_n_s16::<8>(x)));
                vst1q_s16(numbers.as_mut_ptr(), vreinterpretq_s16_s32(vcombine_s32(vzip1_s32(low, high), vzip2_s32(low, high))));
            }
        }
        unit
    }
    #[inline(always)]
    unsafe fn offsets(_: &[u8], _: &mut Vec<i32>) {}
    #[inline(always)]
    unsafe fn scores(levels: &[u8], queries: Queries, to: Scores) {
        // SAFETY: see above.
        unsafe {
            match queries.n {
                1 => scores::<1, 8>(levels, queries, to),
                2 => scores::<2, 4>(levels, queries, to),
                3 => scores::<3, 2>(levels, queries, to),
                _ => scores::<4, 2>(levels, queries, to),
            }
        }
    }
    /// The low digits of every 16 rows, then their high ones.
    #[inline(always)]
    unsafe fn row_digits(x: &[f32], out: &mut [u8]) -> (f32, ()) {
        let numbers = bytemuck::cast_slice_mut(out);
        let unit = round(x, numbers);
        for numbers in numbers.chunks_exact_mut(16) {
            let p = numbers.as_mut_ptr();
            // SAFETY: see above; pieces have 16 numbers.
            unsafe {
                let (a, b) = (vld1q_s16(p), vld1q_s16(p.add(8)));
                let (low, high) = (vcombine_s8(vmovn_s16(a), vmovn_s16(b)), vcombine_s8(vrshrn_n_s16::<8>(a), vrshrn_n_s16::<8>(b)));
                vst1q_s8(p.cast(), low);
                vst1q_s8(p.add(8).cast(), high);
            }
        }
        (unit, ())
    }
    #[inline(always)]
    unsafe fn values<const WIDTH: u32, const C: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Self>) {
        // SAFETY: see above.
        unsafe {
            match s.queries {
                1 => value_block::<WIDTH, C, 1>(tiles, at, j, s),
                2 => value_block::<WIDTH, C, 2>(tiles, at, j, s),
                3 => value_block::<WIDTH, C, 3>(tiles, at, j, s),
                _ => value_block::<WIDTH, C, 4>(tiles, at, j, s),
            }
        }
    }
}
