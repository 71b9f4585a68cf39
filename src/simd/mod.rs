//! Vector kernels behind run-time dispatch. The granularity is a row or a tile, never an element.
//!
//! One body per kernel over [`lanes::Lanes`], compiled once for the baseline and once for each instruction-set level; tiles have ways of their own in
//! whole numbers, for the baseline ([`whole`]), for AVX2 ([`madd`]) and where the CPU multiplies bytes ([`vnni`]). `SPECTRAL_KV_CPU_LEVEL`
//! (`portable`, `avx2`, `avx512`, `avx512vnni`) may lower the level, never raise it. Sums run in a fixed order per level, so results repeat; levels
//! differ in the last bits. Must not know about bases, cells or arenas: it sees slices.

pub mod dense;
mod encode;
pub mod lanes;
#[cfg(target_arch = "x86_64")]
mod madd;
mod memory;
mod products;
mod tile;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod vnni;
mod whole;

pub use dense::{MatMut, MatRef};
pub use encode::code_row;
pub use memory::{Ahead, Lines};
pub use products::{Pass, Products, Projected, BATCH};

use crate::layout::{Widths, TILE};
use half::f16;
use std::sync::OnceLock;

/// An instruction-set level, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with VNNI and VBMI.
    Avx512Vnni,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Vnni];

    /// Its name in `SPECTRAL_KV_CPU_LEVEL`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
        }
    }
    /// Whether its tiles are computed in whole numbers of 16 bits, not in f32.
    #[cfg(test)]
    pub(crate) fn rounds_to_16_bits(self) -> bool {
        !matches!(self, Level::Avx512)
    }
}

/// One level's kernels. Matrices are row-major.
#[expect(clippy::type_complexity, reason = "a kernel's arguments are its type")]
pub struct Kernels {
    /// Whose they are.
    pub level: Level,
    /// `c[n][m] += a[n][k] * b[k][m]`. Arguments `a, b, c, n, k, m`.
    pub multiply: fn(MatRef, MatRef, MatMut, usize, usize, usize),
    /// `c[n][m] = a[n] . b[m]`, rows of `k` floats. Arguments `a, b, c, n, k, m`.
    pub dots: fn(MatRef, MatRef, MatMut, usize, usize, usize),
    /// `out += sum_j coefficients[j] * matrix[j]` for rows of `out.len()` elements.
    pub accumulate: fn(matrix: &[f32], coefficients: &[f32], out: &mut [f32]),
    /// `x[i] = exp(x[i] - shift)`; returns the sum.
    pub exp_sum: fn(x: &mut [f32], shift: f32) -> f32,
    /// The largest of `x`, -inf when it is empty.
    pub largest: fn(x: &[f32]) -> f32,
    /// `out[i] = scale * x[i]`, f16 as f32.
    pub widen: fn(x: &[f16], scale: f32, out: &mut [f32]),
    /// `out[j][i] = a[i][j]`. Arguments `a, out`, rows and columns of `a`.
    pub transpose: fn(MatRef, MatMut, usize, usize),
    /// `out[i] = table[index[i]]` for the rows of a tile.
    pub lookup: fn(table: &[f32; 256], index: &[u8], out: &mut [f32; TILE]),
    /// Sums of every 16 floats.
    pub lane_sums: fn(x: &[f32], out: &mut [f32]),
    /// `out[i] = x[i] * gains[i]` for the rows of a tile; returns the sum of `x`.
    pub weigh: fn(x: &[f32; TILE], gains: &[f32; TILE], out: &mut [f32; TILE]) -> f32,
    /// Cosines and sines of `delta * omega[i]`, to f32.
    pub turn: fn(omega: &[f64], delta: f64, cos: &mut [f32], sin: &mut [f32]),
    /// Rotate the pairs `(x[2i], x[2i+1])` by angles with these cosines and sines. Arguments `x, cos, sin`.
    pub rotate_adjacent: fn(&mut [f32], &[f32], &[f32]),
    /// The same for pairs `(a[i], b[i])`. Arguments `a, b, cos, sin`.
    pub rotate_halves: fn(&mut [f32], &mut [f32], &[f32], &[f32]),
    /// The values of a tile's first coefficients, as many as there are in `out`.
    pub unpack: fn(widths: Widths, codes: &[u8], out: &mut [[f32; TILE]]),
    /// Gains and codes of a part of the coefficients of a tile's rows. Arguments `widths, weights, z, gains, codes`: a weight and 64 values for each
    /// coefficient.
    pub quantise: fn(Widths, &[f32], &[[f32; TILE]], &mut [u8], &mut [u8]),
    /// Codes of 4 bits, for [`Kernels::unpack_fine`]; returns the scale.
    pub quantise_fine: fn(x: &[f32], nibbles: &mut [u8]) -> f32,
    /// `out[i] = scale * level` of codes of 4 bits: byte `k` has those of elements `k` and, in its high half, `n / 2 + k`.
    pub unpack_fine: fn(nibbles: &[u8], scale: f32, out: &mut [f32]),
    /// Make queries ready for [`Kernels::tile_scores`] of a part, once `n`, `frames`, and its `widths`, `z` and `stride` are set.
    pub prepare: fn(&mut Products, part: usize),
    /// `x[q][row] = gains[row] * sum_j z[q][j] * value(code[j][row])` over a part of the coefficients of the 64 rows of a tile of frame `frame`; to
    /// `out`, whose rows are `stride` apart, goes `x`, or is added; in the end `scale * (means[q] + out)`, of which each query's largest is noted.
    pub tile_scores: fn(&mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize),
    /// `sums[j][q] += sum_row p[q][row] * value(code[j][row])` over up to [`BATCH`] tiles of the same widths, each sum left in 16 lanes. Rows of `p`
    /// are `stride` apart, and have the tiles' rows one after another. Arguments `widths, tiles, p, stride, n, sums`, memory to work in.
    pub tile_values: fn(Widths, &[&[u8]], &[f32], usize, usize, &mut [f32], &mut Products),
}

/// The functions of a level. They are safe to call through its table only, which [`at`] hands out after asking the CPU.
macro_rules! level {
    ($module:ident, $level:ident, $lanes:ty, $columns:literal, $(#[$feature:meta])?) => {
        mod $module {
            use super::*;

            $(#[$feature])?
            fn multiply(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::multiply::<$lanes, $columns>(a, b, c, n, k, m) }
            }
            $(#[$feature])?
            fn dots(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::dots::<$lanes>(a, b, c, n, k, m) }
            }
            $(#[$feature])?
            fn accumulate(matrix: &[f32], coefficients: &[f32], out: &mut [f32]) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::accumulate::<$lanes>(matrix, coefficients, out) }
            }
            $(#[$feature])?
            fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::exp_sum::<$lanes>(x, shift) }
            }
            $(#[$feature])?
            fn largest(x: &[f32]) -> f32 {
                dense::largest(x)
            }
            $(#[$feature])?
            fn widen(x: &[f16], scale: f32, out: &mut [f32]) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::widen::<$lanes>(x, scale, out) }
            }
            $(#[$feature])?
            fn transpose(a: MatRef, out: MatMut, n: usize, m: usize) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::transpose::<$lanes>(a, out, n, m) }
            }
            $(#[$feature])?
            fn lookup(table: &[f32; 256], index: &[u8], out: &mut [f32; TILE]) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::lookup::<$lanes>(table, index, out) }
            }
            $(#[$feature])?
            fn lane_sums(x: &[f32], out: &mut [f32]) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::lane_sums::<$lanes>(x, out) }
            }
            $(#[$feature])?
            fn weigh(x: &[f32; TILE], gains: &[f32; TILE], out: &mut [f32; TILE]) -> f32 {
                dense::weigh(x, gains, out)
            }
            $(#[$feature])?
            fn turn(omega: &[f64], delta: f64, cos: &mut [f32], sin: &mut [f32]) {
                dense::turn(omega, delta, cos, sin)
            }
            $(#[$feature])?
            fn rotate_adjacent(x: &mut [f32], cos: &[f32], sin: &[f32]) {
                dense::rotate_adjacent(x, cos, sin)
            }
            $(#[$feature])?
            fn rotate_halves(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
                dense::rotate_halves(a, b, cos, sin)
            }
            $(#[$feature])?
            fn unpack(widths: Widths, codes: &[u8], out: &mut [[f32; TILE]]) {
                // SAFETY: this function is compiled for the features.
                unsafe { tile::unpack_tile::<$lanes>(widths, codes, 0, out) }
            }
            $(#[$feature])?
            fn quantise(widths: Widths, weights: &[f32], z: &[[f32; TILE]], gains: &mut [u8], codes: &mut [u8]) {
                encode::quantise(widths, weights, z, gains, codes)
            }
            $(#[$feature])?
            fn quantise_fine(x: &[f32], nibbles: &mut [u8]) -> f32 {
                encode::quantise_fine(x, nibbles)
            }
            $(#[$feature])?
            fn unpack_fine(nibbles: &[u8], scale: f32, out: &mut [f32]) {
                // SAFETY: this function is compiled for the features.
                unsafe { dense::unpack_fine::<$lanes>(nibbles, scale, out) }
            }
            $(#[$feature])?
            fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
                // SAFETY: this function is compiled for the features.
                unsafe { tile::tile_scores::<$lanes, $columns>(s, pass, codes, gains, out, stride) }
            }
            $(#[$feature])?
            fn tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
                // SAFETY: this function is compiled for the features.
                unsafe { tile::wide_values::<$lanes>(widths, tiles, widths.rank(), p, stride, n, sums, work) }
            }

            // SAFETY, for all: only `at` hands out this table, after asking the CPU for these features.
            #[allow(unused_unsafe, reason = "the baseline needs no features")]
            pub(super) static KERNELS: Kernels = Kernels {
                level: Level::$level,
                // SAFETY: see above.
                multiply: |a, b, c, n, k, m| unsafe { multiply(a, b, c, n, k, m) },
                // SAFETY: see above.
                dots: |a, b, c, n, k, m| unsafe { dots(a, b, c, n, k, m) },
                // SAFETY: see above.
                accumulate: |m, c, o| unsafe { accumulate(m, c, o) },
                // SAFETY: see above.
                exp_sum: |x, s| unsafe { exp_sum(x, s) },
                // SAFETY: see above.
                largest: |x| unsafe { largest(x) },
                // SAFETY: see above.
                widen: |x, s, o| unsafe { widen(x, s, o) },
                // SAFETY: see above.
                transpose: |a, o, n, m| unsafe { transpose(a, o, n, m) },
                // SAFETY: see above.
                lookup: |t, i, o| unsafe { lookup(t, i, o) },
                // SAFETY: see above.
                lane_sums: |x, o| unsafe { lane_sums(x, o) },
                // SAFETY: see above.
                weigh: |x, g, o| unsafe { weigh(x, g, o) },
                // SAFETY: see above.
                turn: |o, d, c, s| unsafe { turn(o, d, c, s) },
                // SAFETY: see above.
                rotate_adjacent: |x, c, s| unsafe { rotate_adjacent(x, c, s) },
                // SAFETY: see above.
                rotate_halves: |a, b, c, s| unsafe { rotate_halves(a, b, c, s) },
                // SAFETY: see above.
                unpack: |w, c, o| unsafe { unpack(w, c, o) },
                // SAFETY: see above.
                quantise: |w, e, z, g, c| unsafe { quantise(w, e, z, g, c) },
                // SAFETY: see above.
                quantise_fine: |x, n| unsafe { quantise_fine(x, n) },
                // SAFETY: see above.
                unpack_fine: |n, s, o| unsafe { unpack_fine(n, s, o) },
                prepare: |_, _| {},
                // SAFETY: see above.
                tile_scores: |s, p, c, g, o, n| unsafe { tile_scores(s, p, c, g, o, n) },
                // SAFETY: see above.
                tile_values: |w, t, p, s, n, o, m| unsafe { tile_values(w, t, p, s, n, o, m) },
            };
        }
    };
}

level!(plain, Portable, lanes::Plain, 1,);
#[cfg(target_arch = "x86_64")]
level!(avx2_f32, Avx2, lanes::Ymm, 2, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
level!(avx512, Avx512, lanes::Zmm, 4, #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);

mod portable {
    use super::*;

    pub(super) static KERNELS: Kernels =
        Kernels { prepare: whole::prepare, tile_scores: whole::tile_scores, tile_values: whole::tile_values, ..plain::KERNELS };
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    fn prepare(s: &mut Products, part: usize) {
        // SAFETY: this function is compiled for the features.
        unsafe { madd::prepare(s, part) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
        // SAFETY: this function is compiled for the features.
        unsafe { madd::tile_scores(s, pass, codes, gains, out, stride) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
        // SAFETY: this function is compiled for the features.
        unsafe { madd::tile_values(widths, tiles, p, stride, n, sums, work) }
    }

    // SAFETY, for all: only `at` hands out this table, after asking the CPU for these features.
    pub(super) static KERNELS: Kernels = Kernels {
        // SAFETY: see above.
        prepare: |s, p| unsafe { prepare(s, p) },
        // SAFETY: see above.
        tile_scores: |s, p, c, g, o, n| unsafe { tile_scores(s, p, c, g, o, n) },
        // SAFETY: see above.
        tile_values: |w, t, p, s, n, o, m| unsafe { tile_values(w, t, p, s, n, o, m) },
        ..avx2_f32::KERNELS
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512vnni {
    use super::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
    fn prepare(s: &mut Products, part: usize) {
        // SAFETY: this function is compiled for the features.
        unsafe { vnni::prepare(s, part) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
    fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
        // SAFETY: this function is compiled for the features.
        unsafe { vnni::tile_scores(s, pass, codes, gains, out, stride) }
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
    fn tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
        // SAFETY: this function is compiled for the features.
        unsafe { vnni::tile_values(widths, tiles, p, stride, n, sums, work) }
    }

    // SAFETY, for all: only `at` hands out this table, after asking the CPU for these features.
    pub(super) static KERNELS: Kernels = Kernels {
        level: Level::Avx512Vnni,
        // SAFETY: see above.
        prepare: |s, p| unsafe { prepare(s, p) },
        // SAFETY: see above.
        tile_scores: |s, p, c, g, o, n| unsafe { tile_scores(s, p, c, g, o, n) },
        // SAFETY: see above.
        tile_values: |w, t, p, s, n, o, m| unsafe { tile_values(w, t, p, s, n, o, m) },
        ..avx512::KERNELS
    };
}

/// The kernels of a level, or `None` when this CPU lacks it.
pub fn at(level: Level) -> Option<&'static Kernels> {
    match level {
        Level::Portable => Some(&portable::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")).then_some(&avx2::KERNELS)
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (at(Level::Avx2).is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq"))
        .then_some(&avx512::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => (at(Level::Avx512).is_some() && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi"))
            .then_some(&avx512vnni::KERNELS),
        #[cfg(not(target_arch = "x86_64"))]
        _ => None,
    }
}

/// The best kernels of this CPU, or those of the lower level that `SPECTRAL_KV_CPU_LEVEL` names.
pub fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let named = std::env::var("SPECTRAL_KV_CPU_LEVEL").ok().and_then(|name| Level::ALL.into_iter().find(|l| l.name() == name));
        let most = named.unwrap_or(Level::Avx512Vnni);
        Level::ALL.into_iter().rev().filter(|l| *l <= most).find_map(at).unwrap_or(&portable::KERNELS)
    })
}

/// Tiles in f32 without intrinsics: what every level is compared with.
#[cfg(test)]
pub(crate) fn plain() -> &'static Kernels {
    &plain::KERNELS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::quant;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn levels() -> impl Iterator<Item = &'static Kernels> {
        Level::ALL.into_iter().filter_map(|level| {
            let kernels = at(level);
            if kernels.is_none() {
                println!("skipped: this CPU has no {level:?}");
            }
            kernels
        })
    }

    /// Largest error, in units of what `bound` says of the size of the terms.
    fn worst(got: &[f32], want: impl Iterator<Item = (f64, f64)>) -> f64 {
        got.iter().zip(want).map(|(got, (want, bound))| (f64::from(*got) - want).abs() / bound.max(1e-30)).fold(0.0, f64::max)
    }

    #[test]
    fn products_of_matrices_of_every_level_agree_with_f64() {
        for k in levels() {
            for (n, depth, m) in [(1, 2, 1), (4, 64, 128), (3, 80, 64), (7, 96, 50), (5, 33, 16), (6, 256, 72), (2, 0, 32)] {
                let (sa, sb, sc) = (depth + 3, m + 5, m + 1);
                let (a, b, start) = (noise(n * sa, 1), noise((depth + 1) * sb, 2), noise(n * sc, 3));
                let mut c = start.clone();
                (k.multiply)(MatRef::new(&a, sa), MatRef::new(&b, sb), MatMut::new(&mut c, sc), n, depth, m);
                let terms = |i: usize| (0..depth).map(move |j| (i / sc * sa + j, j * sb + i % sc));
                let want = (0..n * sc).map(|i| {
                    let own = if i % sc < m { terms(i).map(|(x, y)| f64::from(a[x]) * f64::from(b[y])).collect() } else { vec![] };
                    (f64::from(start[i]) + own.iter().sum::<f64>(), 1.0 + own.iter().map(|x| x.abs()).sum::<f64>())
                });
                assert!(worst(&c, want) < 1e-6, "{:?} {n} {depth} {m}", k.level);

                let (b, mut c) = (noise(m * sa, 4), start.clone());
                (k.dots)(MatRef::new(&a, sa), MatRef::new(&b, sa), MatMut::new(&mut c, sc), n, depth, m);
                let want = (0..n * sc).map(|i| match i % sc < m {
                    true => {
                        let terms = (0..depth).map(|j| f64::from(a[i / sc * sa + j]) * f64::from(b[i % sc * sa + j]));
                        (terms.clone().sum(), terms.map(f64::abs).sum())
                    }
                    false => (f64::from(start[i]), 1.0),
                });
                assert!(worst(&c, want) < 1e-6, "{:?} {n} {depth} {m}", k.level);
            }
        }
    }

    #[test]
    fn a_matrix_that_is_shorter_than_said_is_refused() {
        for k in levels() {
            let short = || {
                let (a, b, mut c) = (vec![0.0; 4 * 16], vec![0.0; 16 * 31], vec![0.0; 4 * 32]);
                (k.multiply)(MatRef::new(&a, 16), MatRef::new(&b, 32), MatMut::new(&mut c, 32), 4, 16, 32);
            };
            assert!(std::panic::catch_unwind(short).is_err());
        }
    }

    /// Queries, codes and tiles of every width; also none of some widths.
    const CASES: [[usize; 7]; 6] =
        [[3, 2, 4, 5, 3, 6, 7], [0, 0, 0, 0, 0, 40, 88], [0, 0, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0], [0; 7], [0, 0, 9, 0, 7, 0, 1]];

    fn codes(widths: Widths, seed: u32) -> Vec<u8> {
        let mut codes: Vec<u8> = noise(widths.bytes(), seed).iter().map(|x| (x * 128.0).floor() as i8 as u8).collect();
        // -128 is no 8-bit code.
        codes[..widths.counts[0] * 64].iter_mut().filter(|c| **c == 128).for_each(|c| *c = 1);
        codes
    }

    fn value(widths: Widths, codes: &[u8], j: usize, row: usize) -> f64 {
        let (width, at) = widths.place(j);
        f64::from(quant::level(width, quant::get(width, &codes[at..], row)))
    }

    /// Products with `n` queries in the second of two frames, for parts of these widths, and the queries of that frame.
    fn products(k: &Kernels, parts: [Widths; 2], n: usize) -> (Products, [Vec<f32>; 2]) {
        let mut s = Products { n, frames: 2, frame: 1, means: noise(2 * n, 9), scale: 1.7, largest: vec![-3.0; n], ..Products::default() };
        let mut queries = [vec![], vec![]];
        for (part, widths) in parts.into_iter().enumerate() {
            let stride = widths.rank().next_multiple_of(16);
            let own = &mut s.parts[part];
            (own.widths, own.stride) = (widths, stride);
            own.z.resize((2 * n * stride + 64) * 4);
            // Queries differ in magnitude, as their coefficients do.
            let z = noise(2 * n * stride, 4 + part as u32);
            let z: Vec<f32> = z.iter().enumerate().map(|(i, z)| z * 0.97f32.powi((i % stride.max(1)) as i32) * 30.0).collect();
            own.z.floats_mut()[..2 * n * stride].copy_from_slice(&z);
            queries[part] = z[n * stride..].to_vec();
            (k.prepare)(&mut s, part);
        }
        (s, queries)
    }

    /// The worst error in the scores of a tile, made of both parts and of what was there before.
    fn score_error(k: &Kernels, parts: [Widths; 2], n: usize) -> f64 {
        let (mut s, queries) = products(k, parts, n);
        let codes = parts.map(|widths| codes(widths, 3));
        let gains: [[f32; TILE]; 2] = std::array::from_fn(|p| std::array::from_fn(|row| 0.5 + row as f32 / 64.0 * (1.0 + p as f32)));
        let stride = TILE + 16;
        let before = noise(n * stride, 17);
        let mut out = before.clone();
        for part in 0..2 {
            (k.tile_scores)(&mut s, Pass { part, add: part == 1, finish: part == 1 }, &codes[part], &gains[part], &mut out, stride);
            if part == 0 {
                // What is left between the passes belongs to the scores.
                out.iter_mut().zip(&before).enumerate().filter(|(i, _)| i % stride < TILE).for_each(|(_, (out, x))| *out += x);
            }
        }
        let mut error = 0.0f64;
        for q in 0..n {
            let (mean, scale) = (f64::from(s.means[n + q]), f64::from(s.scale));
            let want = (0..stride).map(|row| {
                if row >= TILE {
                    return (f64::from(before[q * stride + row]), 1e-9);
                }
                let (mut sum, mut power) = (mean + f64::from(before[q * stride + row]), mean.abs() + 1.0);
                for (part, widths) in parts.into_iter().enumerate() {
                    let z = &queries[part][q * s.parts[part].stride..];
                    let terms = (0..widths.rank()).map(|j| f64::from(z[j]) * value(widths, &codes[part], j, row));
                    sum += f64::from(gains[part][row]) * terms.clone().sum::<f64>();
                    power += f64::from(gains[part][row]) * terms.map(|x| x * x).sum::<f64>().sqrt();
                }
                (scale * sum, scale * power)
            });
            let scores = &out[q * stride..][..stride];
            error = error.max(worst(scores, want));
            assert_eq!(s.largest[q], scores[..TILE].iter().copied().fold(-3.0, f32::max));
        }
        error
    }

    /// The worst error in sums of values over five tiles.
    fn value_error(k: &Kernels, widths: Widths, n: usize, seed: u32) -> f64 {
        let (rank, mut work) = (widths.rank(), Products::default());
        let codes: Vec<Vec<u8>> = (0..5).map(|t| codes(widths, 3 + t)).collect();
        let p: Vec<f32> = noise(n * 5 * TILE, seed).iter().map(|x| (x * 6.0 - 6.0).exp()).collect();
        let mut sums = vec![0.125f32; rank * n * lanes::LANES];
        let tiles: Vec<&[u8]> = codes.iter().map(Vec::as_slice).collect();
        (k.tile_values)(widths, &tiles, &p, 5 * TILE, n, &mut sums, &mut work);
        let got: Vec<f32> = sums.chunks_exact(lanes::LANES).map(|l| l.iter().map(|x| f64::from(*x) - 0.125).sum::<f64>() as f32).collect();
        let want = (0..rank * n).map(|i| {
            let terms = (0..5 * TILE).map(|r| f64::from(p[i % n * 5 * TILE + r]) * value(widths, &codes[r / TILE], i / n, r % TILE));
            (terms.clone().sum(), terms.map(|x| x * x).sum::<f64>().sqrt() + 2.0)
        });
        worst(&got, want)
    }

    /// The worst errors of a level in scores and values over all cases, against f64.
    fn tile_errors(k: &Kernels) -> [f64; 2] {
        let mut errors = [0.0f64; 2];
        for (case, counts) in CASES.into_iter().enumerate() {
            for n in [1, 2, 3, 4, 7, 9] {
                let widths = Widths { counts };
                for cut in [9, 4, 3] {
                    errors[0] = errors[0].max(score_error(k, widths.parts(cut), n));
                }
                errors[1] = errors[1].max(value_error(k, widths, n, 8 + case as u32));
            }
        }
        errors
    }

    #[test]
    fn tiles_of_every_level_agree_with_f64() {
        let plain = tile_errors(plain());
        assert!(plain.iter().all(|e| (1e-9..1e-5).contains(e)), "{plain:?}");
        for k in levels() {
            let errors = tile_errors(k);
            println!("{:?}: {errors:?}, plain f32 {plain:?}", k.level);
            // 16 bits of the largest of up to 320 factors, against the root of the summed squares of all terms.
            let bound = if k.level.rounds_to_16_bits() { [4e-4; 2] } else { plain.map(|e| 2.0 * e) };
            assert!(errors.iter().zip(bound).all(|(e, bound)| *e <= bound), "{:?}: {errors:?} {plain:?}", k.level);
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        for (k, rank) in levels().flat_map(|k| [(k, 512), (k, 513), (k, 1024)]) {
            let widths = Widths { counts: [0, 0, 0, rank, 0, 0, 0] };
            let codes = vec![255; widths.bytes()];
            let mut s = Products { n: 1, frames: 1, means: vec![0.0], scale: 1.0, largest: vec![0.0], ..Products::default() };
            (s.parts[0].widths, s.parts[0].stride) = (widths, rank);
            s.parts[0].z.resize((rank + 64) * 4);
            s.parts[0].z.floats_mut()[..rank].fill(2.0);
            (k.prepare)(&mut s, 0);
            let mut out = vec![0.0; TILE];
            (k.tile_scores)(&mut s, Pass { part: 0, add: false, finish: true }, &codes, &[1.0; TILE], &mut out, TILE);
            let want = 2.0 * value(widths, &codes, 0, 0);
            assert!(worst(&out, (0..TILE).map(|_| (want * rank as f64, want * rank as f64))) < 1e-5, "{:?} {rank}: {out:?}", k.level);
            let mut sums = vec![0.0; rank * lanes::LANES];
            (k.tile_values)(widths, &[codes.as_slice(); BATCH], &[2.0; BATCH * TILE], BATCH * TILE, 1, &mut sums, &mut s);
            let sum: f64 = sums[..lanes::LANES].iter().map(|x| f64::from(*x)).sum();
            assert!((sum / (want * (BATCH * TILE) as f64) - 1.0).abs() < 1e-5, "{:?}: {sum}", k.level);
        }
    }

    #[test]
    fn unpacking_gives_the_levels_of_the_codes() {
        let widths = Widths { counts: CASES[0] };
        let codes = codes(widths, 5);
        for k in levels() {
            for n in [0, 1, 12, widths.rank()] {
                let mut out = vec![[0.0; TILE]; n];
                (k.unpack)(widths, &codes, &mut out);
                for (j, values) in out.iter().enumerate() {
                    let want = (0..TILE).map(|row| (value(widths, &codes, j, row), 1.0));
                    assert!(worst(values, want) < 1e-6, "{:?} {j}", k.level);
                }
            }
        }
    }

    #[test]
    fn small_kernels_of_every_level_agree_with_f64() {
        for k in levels() {
            for d in [2usize, 64, 80, 96, 128, 250] {
                let (m, c, mut y) = (noise(7 * d, 1), noise(7, 2), vec![0.5f32; d]);
                (k.accumulate)(&m, &c, &mut y);
                let want = (0..d).map(|i| (0.5 + (0..7).map(|j| f64::from(c[j]) * f64::from(m[j * d + i])).sum::<f64>(), 4.0));
                assert!(worst(&y, want) < 1e-6);
                let halves: Vec<f16> = noise(d, 3).iter().map(|x| f16::from_f32(*x)).collect();
                (k.widen)(&halves, 0.75, &mut y);
                assert!(y.iter().zip(&halves).all(|(y, x)| *y == 0.75 * x.to_f32()));
            }
            for (n, m) in [(0, 3), (16, 16), (33, 20), (7, 48), (130, 128)] {
                let (sa, so) = (m + 3, n + 1);
                let (a, mut out) = (noise(n * sa, 10), vec![7.0; m * so]);
                (k.transpose)(MatRef::new(&a, sa), MatMut::new(&mut out, so), n, m);
                let want = |i: usize| if i % so < n { a[i % so * sa + i / so] } else { 7.0 };
                assert!(out.iter().enumerate().all(|(i, x)| *x == want(i)), "{:?} {n} {m}", k.level);
            }
            let (halves, mut y): (Vec<f16>, _) = ((0..=u16::MAX).map(f16::from_bits).collect(), vec![0.0; 1 << 16]);
            (k.widen)(&halves, 1.0, &mut y);
            // A NaN may become a quiet one.
            let same = |y: f32, x: f16| y.to_bits() == x.to_f32().to_bits() || y.is_nan() && x.is_nan();
            assert!(y.iter().zip(&halves).all(|(y, x)| same(*y, *x)), "{:?}", k.level);
            let mut x: Vec<f32> = noise(1001, 5).iter().map(|x| x * 90.0 - 90.0).collect();
            x[17] = f32::NEG_INFINITY;
            let want: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
            for n in [0, 1, 15, 16, 17, 64, 1001] {
                assert_eq!((k.largest)(&x[..n]), x[..n].iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
            let sum = (k.exp_sum)(&mut x, 0.0);
            for (x, w) in x.iter().zip(&want).filter(|(_, w)| **w > 1e-37) {
                assert!((f64::from(*x) / w - 1.0).abs() < 2e-5, "{x} {w}");
            }
            assert_eq!(x[17], 0.0);
            assert!((f64::from(sum) / want.iter().sum::<f64>() - 1.0).abs() < 1e-5);

            let (x, gains) = (noise(TILE, 6), noise(TILE, 7));
            let (x, gains): ([f32; TILE], [f32; TILE]) = (x.try_into().unwrap(), gains.try_into().unwrap());
            let (table, index): ([f32; 256], [u8; TILE]) = (std::array::from_fn(|i| i as f32 * 0.37), std::array::from_fn(|i| (i * 41) as u8));
            let mut found = [0.0; TILE];
            (k.lookup)(&table, &index, &mut found);
            assert!(found.iter().zip(index).all(|(x, i)| *x == table[usize::from(i)]));
            for n in [1, 4, 6, 9] {
                let (lanes, mut sums) = (noise(n * 16, 8), vec![0.0; n]);
                (k.lane_sums)(&lanes, &mut sums);
                assert!(worst(&sums, lanes.chunks(16).map(|l| (l.iter().map(|x| f64::from(*x)).sum(), 16.0))) < 1e-7);
            }
            let mut weighed = [f32::NAN; TILE];
            let before = (k.weigh)(&x, &gains, &mut weighed);
            assert!(weighed.iter().zip(x.iter().zip(gains)).all(|(w, (x, g))| *w == x * g));
            assert!((f64::from(before) - x.iter().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-5);

            let (cos, sin) = (&gains[..29], &gains[29..58]);
            let (mut adjacent, mut halves) = (x, x);
            (k.rotate_adjacent)(&mut adjacent[..58], cos, sin);
            let (a, b) = halves.split_at_mut(29);
            (k.rotate_halves)(a, &mut b[..29], cos, sin);
            for i in 0..29 {
                let turned = |a: f32, b: f32| {
                    let [a, b, c, s] = [a, b, cos[i], sin[i]].map(f64::from);
                    [a * c - b * s, b * c + a * s]
                };
                let got = [adjacent[2 * i], adjacent[2 * i + 1], halves[i], halves[i + 29]];
                let want = [turned(x[2 * i], x[2 * i + 1]), turned(x[i], x[i + 29])];
                assert!(worst(&got, want.into_iter().flatten().map(|w| (w, 1.0))) < 3e-7);
            }
            assert!(adjacent[58..] == x[58..] && halves[58..] == x[58..]);
        }
    }

    #[test]
    fn cosines_and_sines_of_every_level_agree_with_f64() {
        let omega: Vec<f64> = (0..67).map(|i| 500_000f64.powf(-f64::from(i) / 67.0)).collect();
        for k in levels() {
            for delta in [0.0, 1.0, -1.0, 63.0, -4097.0, 131_071.0, -1_000_003.0, 2_147_483_647.0] {
                let (mut cos, mut sin) = (vec![0.0; 67], vec![0.0; 67]);
                (k.turn)(&omega, delta, &mut cos, &mut sin);
                for (i, w) in omega.iter().enumerate() {
                    let (s, c) = (delta * w).sin_cos();
                    assert!(
                        (f64::from(cos[i]) - c).abs() < 2e-7 && (f64::from(sin[i]) - s).abs() < 2e-7,
                        "{:?} {delta} {w}: {} {c} {} {s}",
                        k.level,
                        cos[i],
                        sin[i]
                    );
                }
            }
        }
    }
}
