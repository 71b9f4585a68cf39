//! The list of kernels, each once, and a table of them for each level.
//!
//! Of the list are made the struct [`Kernels`] and, by level, a function compiled for the level's features around each body, and the table that points
//! to them. A body is generic code over `V`, the level's floats, or, where it is about tiles, over `W`, the way in which `tiles` computes with codes.
//! Must not know which level a CPU has: [`super::at`] asks before it hands out a table.

use super::dense::{self, MatMut, MatRef};
use super::memory::Lines;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::products::{Pass, Products};
use super::projection::Projection;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, vnni};
use super::{encode, portable, tiles_float, Level};
use crate::layout::gain::Gains;
use crate::layout::{Widths, TILE};
use half::f16;

/// Hands the list to the macro `$with`, behind `$level`: what a kernel does, what it is called, its arguments and its body.
macro_rules! kernels {
    ($with:ident $level:tt) => {
        $with! { $level
            /// `c[n][m] += a[n][k] * b[k][m]`.
            multiply(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) = dense::multiply::<V>;
            /// `c[n][m] = a[n] . b[m]`, rows of `k` floats.
            dots(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) = dense::dots::<V>;
            /// `out += sum_j coefficients[j] * matrix[j]` for rows of `out.len()` elements.
            accumulate(matrix: &[f32], coefficients: &[f32], out: &mut [f32]) = dense::accumulate::<V>;
            /// `x[i] = exp(x[i] - shift)`; returns the sum.
            exp_sum(x: &mut [f32], shift: f32) -> f32 = dense::exp_sum::<V>;
            /// The largest of `x`, -inf when it is empty.
            largest(x: &[f32]) -> f32 = dense::largest;
            /// `out[i] = scale * x[i]`, f16 as f32.
            widen(x: &[f16], scale: f32, out: &mut [f32]) = dense::widen::<V>;
            /// `out[j][i] = a[i][j]`, for `rows` rows of `columns` floats of `a`.
            transpose(a: MatRef, out: MatMut, rows: usize, columns: usize) = dense::transpose::<V>;
            /// The gains of the rows of a tile by their codes.
            lookup(gains: &Gains, codes: &[u8], out: &mut [f32; TILE]) = tiles::lookup::<W>;
            /// Sums of every 16 floats.
            lane_sums(x: &[f32], out: &mut [f32]) = dense::lane_sums::<V>;
            /// `out[i] = x[i] * gains[i]` for the rows of a tile; returns the sum of `x`.
            weigh(x: &[f32; TILE], gains: &[f32; TILE], out: &mut [f32; TILE]) -> f32 = dense::weigh;
            /// Cosines and sines of `delta * omega[i]`, to f32.
            turn(omega: &[f64], delta: f64, cos: &mut [f32], sin: &mut [f32]) = dense::turn;
            /// Rotate the pairs `(x[2i], x[2i+1])` by angles with these cosines and sines.
            rotate_adjacent(x: &mut [f32], cos: &[f32], sin: &[f32]) = dense::rotate_adjacent;
            /// The same for pairs `(a[i], b[i])`.
            rotate_halves(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) = dense::rotate_halves;
            /// The values of a tile's first coefficients, as many as there are in `out`.
            unpack(widths: Widths, codes: &[u8], out: &mut [[f32; TILE]]) = tiles_float::unpack::<V>;
            /// Gains and codes of a part of the coefficients of a tile's rows: `weights` and `z` have a weight and 64 values for each coefficient.
            quantise(widths: Widths, weights: &[f32], z: &[[f32; TILE]], gains: &mut [u8], codes: &mut [u8]) = encode::quantise;
            /// Codes of 4 bits, for [`Kernels::unpack_fine`]; returns the scale.
            quantise_fine(x: &[f32], nibbles: &mut [u8]) -> f32 = encode::quantise_fine;
            /// `out[i] = scale * level` of codes of 4 bits: byte `k` has those of elements `k` and, in its high half, `n / 2 + k`.
            unpack_fine(nibbles: &[u8], scale: f32, out: &mut [f32]) = dense::unpack_fine::<V>;
            /// Let `to` have a matrix of `d` rows of `d` floats.
            hold(matrix: &[f32], d: usize, to: &mut Projection) = tiles::hold::<W>;
            /// `out[i][j] = rows[i] . matrix[j]` for the first `columns` rows of a matrix, as many as there are vectors of; those of `out` are
            /// [`Projection::stride`] apart. `work` is memory to work in.
            project(by: &Projection, rows: &[f32], n: usize, columns: usize, out: &mut [f32], work: &mut Lines) = tiles::project::<W>;
            /// Make queries ready for [`Kernels::tile_scores`] of a part, once `n`, `frames`, and its `widths`, `z` and `stride` are set.
            prepare(s: &mut Products, part: usize) = tiles::prepare::<W>;
            /// `x[q][row] = gains[row] * sum_j z[q][j] * value(code[j][row])` over a part of the coefficients of the rows of some tiles of frame `frame`;
            /// to `out`, whose rows are `stride` apart and have the tiles' rows one after another, goes `x`, or is added; in the end
            /// `scale * (means[q] + out)`, of which each query's largest is noted.
            tile_scores(s: &mut Products, pass: Pass, tiles: &[&[u8]], gains: &[[f32; TILE]], out: &mut [f32], stride: usize)
                = tiles::tile_scores::<W>;
            /// `sums[j][q] += sum_row p[q][row] * value(code[j][row])` over up to [`super::BATCH`] tiles of the same widths, for `n` queries, each sum
            /// left in 16 lanes. Rows of `p` are `stride` apart, and have the tiles' rows one after another. `work` is memory to work in.
            tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products)
                = tiles::tile_values::<W>;
        }
    };
}

macro_rules! declare {
    (() $($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $body:expr;)*) => {
        /// One level's kernels. Matrices are row-major.
        pub struct Kernels {
            /// Whose they are.
            pub level: Level,
            $($(#[$doc])* pub $name: fn($($arg: $type),*) $(-> $out)?,)*
        }
    };
}

macro_rules! table {
    (
        ($table:ident, $level:ident, $floats:ty, $tiles:ident<$way:ty>, #[$feature:meta])
        $($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $body:expr;)*
    ) => {
        /// The table of a level.
        pub static $table: Kernels = {
            use super::$tiles as tiles;
            type V = $floats;
            type W = $way;
            $(
                #[$feature]
                #[allow(unused_unsafe, reason = "some bodies are safe")]
                fn $name($($arg: $type),*) $(-> $out)? {
                    // SAFETY: this function is compiled for the features.
                    unsafe { ($body)($($arg),*) }
                }
            )*
            #[allow(unused_unsafe, reason = "the baseline needs no features")]
            Kernels {
                level: Level::$level,
                // SAFETY: only `at` hands out this table, after asking the CPU for these features.
                $($name: |$($arg),*| unsafe { $name($($arg),*) },)*
            }
        };
    };
}

kernels!(declare());
kernels!(table(PORTABLE, Portable, portable::Plain, tiles_whole<portable::Plain>, #[inline]));
#[cfg(target_arch = "x86_64")]
kernels!(table(AVX2, Avx2, avx2::Ymm, tiles_whole<avx2::Ymm>, #[target_feature(enable = "avx2,fma,f16c")]));
#[cfg(target_arch = "x86_64")]
kernels!(table(
    AVX512, Avx512, avx512::Zmm, tiles_float<avx512::Zmm>,
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
));
#[cfg(target_arch = "x86_64")]
kernels!(table(
    AVX512_VNNI, Avx512Vnni, avx512::Zmm, tiles_whole<vnni::Vnni>,
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
));
#[cfg(target_arch = "aarch64")]
kernels!(table(NEON, Neon, neon::Neon, tiles_whole<neon::Neon>, #[target_feature(enable = "neon,dotprod")]));
// Tiles in f32 without intrinsics: what every level is compared with.
#[cfg(test)]
kernels!(table(PLAIN, Portable, portable::Plain, tiles_float<portable::Plain>, #[inline]));
