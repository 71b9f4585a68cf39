//! Vector kernels behind run-time dispatch. The granularity is a row or a tile, never an element.
//!
//! One body per kernel, written so that the compiler vectorises it, compiled once for the baseline and once for each
//! instruction-set level. `SPECTRAL_KV_CPU_LEVEL` (`portable`, `avx2`, `avx512`) may lower the level, never raise it.
//! Sums run in a fixed order per level, so results repeat; levels differ in the last bits. Must not know about bases,
//! cells or arenas: it sees slices.

pub mod quant;

use crate::config::TILE;
use std::sync::OnceLock;

/// An instruction-set level, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

/// How many coefficients of a tile have each width, widest first, in the order in which they are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Widths {
    /// Coefficients of 8, 6, 5, 4, 3, 2 and 1 bits.
    pub counts: [usize; Widths::BITS.len()],
}

impl Widths {
    /// The widths that are stored, in their order.
    pub const BITS: [u32; 7] = [8, 6, 5, 4, 3, 2, 1];

    /// Coefficients in all.
    pub fn rank(&self) -> usize {
        self.counts.iter().sum()
    }
    /// Bytes of one tile's codes.
    pub fn bytes(&self) -> usize {
        self.counts.iter().zip(Self::BITS).map(|(n, bits)| n * quant::coefficient_bytes(bits)).sum()
    }
    /// Width and byte offset of coefficient `j`.
    #[inline(always)]
    pub fn place(&self, j: usize) -> (u32, usize) {
        let (mut j, mut at) = (j, 0);
        for (n, bits) in self.counts.into_iter().zip(Self::BITS) {
            if j < n {
                return (bits, at + j * quant::coefficient_bytes(bits));
            }
            j -= n;
            at += n * quant::coefficient_bytes(bits);
        }
        (0, at)
    }
}

/// One level's kernels.
pub struct Kernels {
    /// `out[j] = matrix[j] . x` for rows of `x.len()` elements.
    pub matvec: fn(matrix: &[f32], x: &[f32], out: &mut [f32]),
    /// `out += sum_j coefficients[j] * matrix[j]` for rows of `out.len()` elements.
    pub accumulate: fn(matrix: &[f32], coefficients: &[f32], out: &mut [f32]),
    /// For each of the vectors `z` (rank elements each): `out[i] += sum_j z[j] * value(code[j][i])` for the 64 rows of a tile.
    pub tile_scores: fn(widths: Widths, codes: &[u8], z: &[f32], out: &mut [f32]),
    /// For each of the weight vectors `p` (64 each): `acc[j] += sum_i p[i] * value(code[j][i])`, vectors of `acc` being `stride` apart.
    pub tile_values: fn(widths: Widths, codes: &[u8], p: &[f32], acc: &mut [f32], stride: usize),
    /// `x[i] = exp(x[i] - shift)`; returns the sum.
    pub exp_sum: fn(x: &mut [f32], shift: f32) -> f32,
}

#[inline(always)]
fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 32];
    let (ca, cb) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..32 {
            acc[i] = madd::<FMA>(x[i], y[i], acc[i]);
        }
    }
    let mut width = 16;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    acc[0] + tail
}

#[inline(always)]
fn axpy<const FMA: bool>(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = madd::<FMA>(a, *x, *y);
    }
}

#[inline(always)]
fn matvec_body<const FMA: bool>(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    for (row, o) in matrix.chunks_exact(x.len()).zip(out) {
        *o = dot::<FMA>(row, x);
    }
}

#[inline(always)]
fn accumulate_body<const FMA: bool>(matrix: &[f32], coefficients: &[f32], out: &mut [f32]) {
    for (row, c) in matrix.chunks_exact(out.len()).zip(coefficients) {
        axpy::<FMA>(out, *c, row);
    }
}

#[inline(always)]
fn tile_scores_body<const FMA: bool>(widths: Widths, codes: &[u8], z: &[f32], out: &mut [f32]) {
    let rank = widths.rank();
    let mut values = [0.0f32; TILE];
    // One loop over all widths: the body has a single place and is compiled with the level's features.
    for j in 0..rank {
        let (width, at) = widths.place(j);
        quant::unpack(width, &codes[at..], &mut values);
        for (z, out) in z.chunks_exact(rank).zip(out.chunks_exact_mut(TILE)) {
            axpy::<FMA>(out, z[j], &values);
        }
    }
}

#[inline(always)]
fn tile_values_body<const FMA: bool>(widths: Widths, codes: &[u8], p: &[f32], acc: &mut [f32], stride: usize) {
    let rank = widths.rank();
    let mut values = [0.0f32; TILE];
    for j in 0..rank {
        let (width, at) = widths.place(j);
        quant::unpack(width, &codes[at..], &mut values);
        for (p, acc) in p.chunks_exact(TILE).zip(acc.chunks_exact_mut(stride)) {
            acc[j] += dot::<FMA>(p, &values);
        }
    }
}

/// exp by 2^n * 2^f with a degree-6 polynomial for 2^f on [-1/2, 1/2] (Taylor, relative error under 2e-7).
#[inline(always)]
fn exp_lane<const FMA: bool>(x: f32) -> f32 {
    // Under -87 the result is not a normal number and cannot matter beside the maximum's 1.
    let x = x.clamp(-87.0, 88.0);
    let t = x * std::f32::consts::LOG2_E;
    let n = (t + 12_582_912.0) - 12_582_912.0;
    let f = (t - n) * std::f32::consts::LN_2;
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = madd::<FMA>(p, f, c);
    }
    f32::from_bits((p.to_bits() as i32 + ((n as i32) << 23)) as u32)
}

#[inline(always)]
fn exp_sum_body<const FMA: bool>(x: &mut [f32], shift: f32) -> f32 {
    let mut acc = [0.0f32; 16];
    for chunk in x.chunks_mut(16) {
        for (x, acc) in chunk.iter_mut().zip(&mut acc) {
            let e = exp_lane::<FMA>(*x - shift);
            *x = if *x == f32::NEG_INFINITY { 0.0 } else { e };
            *acc += *x;
        }
    }
    acc.iter().sum()
}

static PORTABLE: Kernels = Kernels {
    matvec: matvec_body::<false>,
    accumulate: accumulate_body::<false>,
    tile_scores: tile_scores_body::<false>,
    tile_values: tile_values_body::<false>,
    exp_sum: exp_sum_body::<false>,
};

#[cfg(target_arch = "x86_64")]
macro_rules! level {
    ($module:ident, $name:ident, $features:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn matvec_wide(matrix: &[f32], x: &[f32], out: &mut [f32]) {
                matvec_body::<true>(matrix, x, out)
            }
            #[target_feature(enable = $features)]
            fn accumulate_wide(matrix: &[f32], coefficients: &[f32], out: &mut [f32]) {
                accumulate_body::<true>(matrix, coefficients, out)
            }
            #[target_feature(enable = $features)]
            fn tile_scores_wide(widths: Widths, codes: &[u8], z: &[f32], out: &mut [f32]) {
                tile_scores_body::<true>(widths, codes, z, out)
            }
            #[target_feature(enable = $features)]
            fn tile_values_wide(widths: Widths, codes: &[u8], p: &[f32], acc: &mut [f32], stride: usize) {
                tile_values_body::<true>(widths, codes, p, acc, stride)
            }
            #[target_feature(enable = $features)]
            fn exp_sum_wide(x: &mut [f32], shift: f32) -> f32 {
                exp_sum_body::<true>(x, shift)
            }

            pub(super) static $name: Kernels = Kernels {
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                matvec: |m, x, o| unsafe { matvec_wide(m, x, o) },
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                accumulate: |m, c, o| unsafe { accumulate_wide(m, c, o) },
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                tile_scores: |w, c, z, o| unsafe { tile_scores_wide(w, c, z, o) },
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                tile_values: |w, c, p, a, s| unsafe { tile_values_wide(w, c, p, a, s) },
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                exp_sum: |x, s| unsafe { exp_sum_wide(x, s) },
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(avx2, AVX2, "avx2,fma");
#[cfg(target_arch = "x86_64")]
level!(avx512, AVX512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma");

/// The kernels of a level, or `None` when this CPU lacks it.
pub fn at(level: Level) -> Option<&'static Kernels> {
    match level {
        Level::Portable => Some(&PORTABLE),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(&avx2::AVX2),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (at(Level::Avx2).is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq"))
        .then_some(&avx512::AVX512),
        #[cfg(not(target_arch = "x86_64"))]
        _ => None,
    }
}

/// The best kernels of this CPU, or the lower level that `SPECTRAL_KV_CPU_LEVEL` names.
pub fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let most = match std::env::var("SPECTRAL_KV_CPU_LEVEL").as_deref() {
            Ok("portable") => Level::Portable,
            Ok("avx2") => Level::Avx2,
            _ => Level::Avx512,
        };
        [Level::Avx512, Level::Avx2].into_iter().filter(|l| *l <= most).find_map(at).unwrap_or(&PORTABLE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn every_level_agrees_with_f64() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            let Some(k) = at(level) else {
                println!("skipped: this CPU has no {level:?}");
                continue;
            };
            for d in [2usize, 64, 80, 96, 128, 256] {
                let (m, x) = (noise(7 * d, 1), noise(d, 2));
                let mut out = [0.0; 7];
                (k.matvec)(&m, &x, &mut out);
                for (row, o) in m.chunks(d).zip(out) {
                    let want: f64 = row.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!((f64::from(o) - want).abs() < 1e-5 * d as f64, "{level:?} {d}");
                }
                let mut y = vec![0.5f32; d];
                (k.accumulate)(&m, &out, &mut y);
                for (i, y) in y.iter().enumerate() {
                    let want: f64 = 0.5 + (0..7).map(|j| f64::from(out[j]) * f64::from(m[j * d + i])).sum::<f64>();
                    assert!((f64::from(*y) - want).abs() < 1e-4);
                }
            }
            let widths = Widths { counts: [3, 2, 4, 5, 3, 6, 7] };
            let codes: Vec<u8> = noise(widths.bytes(), 3).iter().map(|x| (x * 127.0) as i8 as u8).collect();
            let z = noise(2 * widths.rank(), 4);
            let mut scores = vec![0.25f32; 2 * TILE];
            (k.tile_scores)(widths, &codes, &z, &mut scores);
            let value = |j: usize, i: usize| {
                let (w, at) = widths.place(j);
                f64::from(quant::level(w, quant::get(w, &codes[at..], i)))
            };
            for (q, s) in scores.chunks(TILE).enumerate() {
                for (i, s) in s.iter().enumerate() {
                    let want: f64 = 0.25 + (0..widths.rank()).map(|j| f64::from(z[q * widths.rank() + j]) * value(j, i)).sum::<f64>();
                    assert!((f64::from(*s) - want).abs() < 1e-4);
                }
            }
            let stride = widths.rank() + 3;
            let mut acc = vec![0.0f32; 2 * stride];
            (k.tile_values)(widths, &codes, &scores, &mut acc, stride);
            for (q, a) in acc.chunks(stride).enumerate() {
                for (j, a) in a.iter().enumerate().take(widths.rank()) {
                    let want: f64 = (0..TILE).map(|i| f64::from(scores[q * TILE + i]) * value(j, i)).sum();
                    assert!((f64::from(*a) - want).abs() < 2e-3);
                }
            }
            let mut x: Vec<f32> = noise(1001, 5).iter().map(|x| x * 90.0 - 90.0).collect();
            x[17] = f32::NEG_INFINITY;
            let want: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
            let sum = (k.exp_sum)(&mut x, 0.0);
            for (x, w) in x.iter().zip(&want).filter(|(_, w)| **w > 1e-37) {
                assert!((f64::from(*x) / w - 1.0).abs() < 2e-5, "{x} {w}");
            }
            assert_eq!(x[17], 0.0);
            assert!((f64::from(sum) / want.iter().sum::<f64>() - 1.0).abs() < 1e-5);
        }
    }
}
