//! Tiles of codes in f32: unpacking, and sums of values over rows. One body each, for every [`Unpack`]. Also what the ways in whole numbers share.

use super::dense::{MatMut, MatRef};
use super::lanes::{Lanes, Plain, LANES};
use super::products::{Pass, Products, Projected};
use super::{dense, unpack};
use crate::layout::quant::{coefficient_bytes, STEP};
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};

/// A level's way from codes to floats.
pub trait Unpack: Lanes {
    /// The 64 values of a packed coefficient.
    ///
    /// # Safety
    /// The level's features are there; `packed` has the bytes of a coefficient of `WIDTH` bits.
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]);
}

impl Unpack for Plain {
    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
        unpack::unpack(WIDTH, packed, out)
    }
}

/// What the largest element of a factor becomes that is rounded to a whole number: two digits of base 256 are then between -128 and 127, and
/// products with levels of a byte stay under 2^22.
pub const FULL: f32 = 32_630.0;

/// Step of each narrow coefficient's levels, zeros behind the last up to `padded`.
pub fn fill_steps(p: &mut Projected, padded: usize) {
    if p.steps.0 == p.widths && p.steps.1.floats().len() >= padded {
        return;
    }
    p.steps.0 = p.widths;
    p.steps.1.resize(padded * 4);
    let steps = p.steps.1.floats_mut();
    let mut n = 0;
    for run in p.widths.narrow_runs() {
        steps[n..n + run.n].fill(STEP[run.bits as usize]);
        n += run.n;
    }
    steps[n..].fill(0.0);
}

#[inline(always)]
unsafe fn unpack_run<V: Unpack, const WIDTH: u32>(codes: &[u8], out: &mut [[f32; TILE]]) {
    for (packed, out) in codes.chunks_exact(coefficient_bytes(WIDTH)).zip(out) {
        // SAFETY: the slice has the coefficient's bytes; features are the caller's.
        unsafe { V::unpack::<WIDTH>(packed, out) }
    }
}

/// The values of coefficients of a tile from number `first` on, as many as there are in `out`.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn unpack_tile<V: Unpack>(widths: Widths, codes: &[u8], first: usize, out: &mut [[f32; TILE]]) {
    let (mut out, mut skip) = (out, first);
    for run in widths.runs() {
        let skipped = skip.min(run.n);
        skip -= skipped;
        let codes = &codes[run.bytes()][skipped * coefficient_bytes(run.bits)..];
        let (values, rest) = out.split_at_mut((run.n - skipped).min(out.len()));
        // SAFETY: features are the caller's.
        unsafe { with_width!(run.bits, WIDTH => unpack_run::<V, WIDTH>(codes, values)) }
        out = rest;
    }
}

/// `sums[j][q] += sum_i values[j][i] * p[q][i]` for `Q` queries, each sum left in 16 lanes. `n` queries lie between coefficients.
#[inline(always)]
unsafe fn values_block<V: Lanes, const Q: usize>(values: &[[f32; TILE]], p: *const f32, stride: usize, sums: *mut f32, n: usize) {
    for (j, values) in values.iter().enumerate() {
        for lane in (0..LANES).step_by(V::N) {
            // SAFETY: `add_values` checked that all of it is there; features are the caller's.
            unsafe {
                let sums = sums.add(j * n * LANES + lane);
                let mut acc: [V; Q] = std::array::from_fn(|q| V::load(sums.add(q * LANES)));
                for i in (0..TILE).step_by(LANES) {
                    let x = V::load(values.as_ptr().add(i + lane));
                    for (q, acc) in acc.iter_mut().enumerate() {
                        *acc = acc.add_product(x, V::load(p.add(q * stride + i + lane)));
                    }
                }
                for (q, acc) in acc.into_iter().enumerate() {
                    acc.store(sums.add(q * LANES));
                }
            }
        }
    }
}

/// `sums[j][q] += sum_i values[j][i] * p[q][i]` for `n` queries, each sum left in 16 lanes; rows of `p` are `stride` apart.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn add_values<V: Lanes>(values: &[[f32; TILE]], p: &[f32], stride: usize, n: usize, sums: &mut [f32]) {
    assert!(sums.len() >= values.len() * n * LANES && p.len() >= (n - 1) * stride + TILE);
    for q in (0..n).step_by(4) {
        // SAFETY: the queries from `q` on are inside of what was checked.
        unsafe {
            let (p, sums) = (p.as_ptr().add(q * stride), sums.as_mut_ptr().add(q * LANES));
            match n - q {
                1 => values_block::<V, 1>(values, p, stride, sums, n),
                2 => values_block::<V, 2>(values, p, stride, sums, n),
                3 => values_block::<V, 3>(values, p, stride, sums, n),
                _ => values_block::<V, 4>(values, p, stride, sums, n),
            }
        }
    }
}

/// `sums[q] = sum_j z[q][j] * value[j]` over the first `first` coefficients of a part, zeros when there is none.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn wide_sums<V: Unpack, const C: usize>(s: &mut Products, part: usize, codes: &[u8], first: usize) {
    s.sums.resize(s.n * TILE * 4);
    let sums = &mut s.sums.floats_mut()[..s.n * TILE];
    sums.fill(0.0);
    s.values.resize(first * TILE * 4);
    let (p, values) = (&s.parts[part], &mut s.values.floats_mut()[..first * TILE]);
    // SAFETY: features are the caller's.
    unsafe {
        unpack_tile::<V>(p.widths, codes, 0, values.as_chunks_mut().0);
        let z = &p.z.floats()[s.frame * s.n * p.stride..];
        dense::multiply::<V, C>(MatRef::new(z, p.stride), MatRef::new(values, TILE), MatMut::new(sums, TILE), s.n, first, TILE);
    }
}

/// Cache lines that are asked for with the scores of a tile, and with the values of a block of coefficients.
const LINES_A_TILE: usize = 20;
const LINES_A_BLOCK: usize = 4;

/// See [`super::Kernels::tile_scores`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn tile_scores<V: Unpack, const C: usize>(
    s: &mut Products,
    pass: Pass,
    codes: &[u8],
    gains: &[f32; TILE],
    out: &mut [f32],
    stride: usize,
) {
    s.ahead.fetch(LINES_A_TILE);
    // SAFETY: features are the caller's.
    unsafe { wide_sums::<V, C>(s, pass.part, codes, s.parts[pass.part].widths.rank()) }
    scale_sums(s, pass, gains, out, stride);
}

/// Sums of products of a part to scores.
#[inline(always)]
pub fn scale_sums(s: &mut Products, pass: Pass, gains: &[f32; TILE], out: &mut [f32], stride: usize) {
    for ((q, out), sums) in out.chunks_mut(stride).enumerate().take(s.n).zip(s.sums.floats().as_chunks::<TILE>().0) {
        let out: &mut [f32; TILE] = (&mut out[..TILE]).try_into().expect("invariant: the rows of a tile");
        if !pass.add {
            *out = [0.0; TILE];
        }
        for ((out, sum), gain) in out.iter_mut().zip(sums).zip(gains) {
            *out += sum * gain;
        }
        if pass.finish {
            s.largest[q] = s.largest[q].max(dense::scale_scores(out, s.means[s.frame * s.n + q], s.scale));
        }
    }
}

/// Coefficients whose sums are made together.
const BLOCK: usize = 16;

/// [`add_values`] of the first `first` coefficients of some tiles, whose probabilities follow each other in `p`.
///
/// # Safety
/// The features of `V` are there.
#[expect(clippy::too_many_arguments, reason = "two factors and where their product goes")]
#[inline(always)]
pub unsafe fn wide_values<V: Unpack>(
    widths: Widths,
    tiles: &[&[u8]],
    first: usize,
    p: &[f32],
    stride: usize,
    n: usize,
    sums: &mut [f32],
    work: &mut Products,
) {
    work.values.resize(BLOCK * TILE * 4);
    let (values, _) = work.values.floats_mut()[..BLOCK * TILE].as_chunks_mut();
    // Few coefficients at a time: their sums, in lanes, stay in the first cache over all tiles.
    for j in (0..first).step_by(BLOCK) {
        let values = &mut values[..BLOCK.min(first - j)];
        for (t, codes) in tiles.iter().enumerate() {
            work.ahead.fetch(LINES_A_BLOCK);
            // SAFETY: features are the caller's.
            unsafe {
                unpack_tile::<V>(widths, codes, j, values);
                add_values::<V>(values, &p[t * TILE..], stride, n, &mut sums[j * n * LANES..]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::lanes::{Ymm, Zmm};
    use super::{Unpack, TILE};
    use crate::layout::quant::{A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6};
    use std::arch::x86_64::*;

    impl Unpack for Ymm {
        #[inline(always)]
        unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
            let (p, out) = (packed.as_ptr(), out.as_mut_ptr());
            // SAFETY: loads of 8 bytes lie inside the planes of `WIDTH`; tables have an entry for every index that is made.
            unsafe {
                let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                let wide = |at: usize| _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(at).cast()));
                // All ones where the row's bit in a 1-bit plane is set.
                let is_set = |at: usize| _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(i32::from(*p.add(at))), bits), bits);
                let right = |x: __m256i, n: usize| _mm256_srl_epi32(x, _mm_cvtsi32_si128(n as i32));
                let masked = |x: __m256i, n: usize, mask: i32| _mm256_and_si256(right(x, n), _mm256_set1_epi32(mask));
                // Loaded before anything is stored: the compiler cannot know that the two do not overlap.
                let words = [p.cast::<i32>().read_unaligned(), p.add(4).cast::<i32>().read_unaligned()];
                let bytes = match WIDTH {
                    2 => [wide(0), wide(8), wide(0), wide(8)],
                    4 => [wide(0), wide(8), wide(16), wide(24)],
                    _ => [_mm256_setzero_si256(); 4],
                };
                let mut values = [_mm256_setzero_ps(); TILE / 8];
                for row in (0..TILE).step_by(8) {
                    let (group, half) = (row / 16, row % 16);
                    let value = match WIDTH {
                        1 => {
                            // The row's bit becomes a sign.
                            let lifts = _mm256_sub_epi32(_mm256_set1_epi32(31 - row as i32 % 32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
                            let sign = _mm256_sllv_epi32(_mm256_set1_epi32(words[row / 32]), lifts);
                            let sign = _mm256_and_ps(_mm256_castsi256_ps(sign), _mm256_set1_ps(-0.0));
                            _mm256_xor_ps(sign, _mm256_set1_ps(LEVELS_1[0]))
                        }
                        2 => {
                            let levels = _mm256_broadcast_ps(&*LEVELS_2.as_ptr().cast::<__m128>());
                            _mm256_permutevar_ps(levels, right(bytes[half / 8], 2 * group))
                        }
                        3 => {
                            let high = _mm256_and_si256(is_set(16 + row / 8), _mm256_set1_epi32(4));
                            let code = _mm256_or_si256(masked(wide(half), 2 * group, 3), high);
                            _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_3.as_ptr()), code)
                        }
                        4 => {
                            let code = right(bytes[row % 32 / 8], row / 32 * 4);
                            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_4.as_ptr()), code);
                            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_4.as_ptr().add(8)), code);
                            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)))
                        }
                        5 => {
                            let high = _mm256_and_si256(is_set(32 + row / 8), _mm256_set1_epi32(16));
                            _mm256_i32gather_ps::<4>(LEVELS_5.as_ptr(), _mm256_or_si256(masked(wide(row % 32), row / 32 * 4, 15), high))
                        }
                        6 => {
                            let high = _mm256_slli_epi32::<4>(masked(wide(32 + half), 2 * group, 3));
                            _mm256_i32gather_ps::<4>(LEVELS_6.as_ptr(), _mm256_or_si256(masked(wide(row % 32), row / 32 * 4, 15), high))
                        }
                        8 => {
                            let c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(row).cast())));
                            _mm256_mul_ps(c, _mm256_fmadd_ps(_mm256_mul_ps(c, c), _mm256_set1_ps(B_8), _mm256_set1_ps(A_8)))
                        }
                        _ => _mm256_setzero_ps(),
                    };
                    values[row / 8] = value;
                }
                for (i, value) in values.into_iter().enumerate() {
                    _mm256_storeu_ps(out.add(8 * i), value);
                }
            }
        }
    }

    impl Unpack for Zmm {
        #[inline(always)]
        unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
            let (p, out) = (packed.as_ptr(), out.as_mut_ptr());
            // SAFETY: loads of 16 bytes and of 2-byte masks lie inside the planes of `WIDTH`; permutations look at the low bits of an index only.
            unsafe {
                let wide = |at: usize| _mm512_cvtepu8_epi32(_mm_loadu_si128(p.add(at).cast()));
                let mask = |at: usize| p.add(at).cast::<u16>().read_unaligned();
                let right = |x: __m512i, n: usize| _mm512_srl_epi32(x, _mm_cvtsi32_si128(n as i32));
                let four = |levels: *const f32| _mm512_broadcast_f32x4(_mm_loadu_ps(levels));
                for group in 0..4 {
                    // A row of nibbles has 32 bytes.
                    let nibbles = || right(wide(group % 2 * 16), group / 2 * 4);
                    let value = match WIDTH {
                        1 => _mm512_mask_blend_ps(mask(2 * group), _mm512_set1_ps(LEVELS_1[0]), _mm512_set1_ps(LEVELS_1[1])),
                        2 => _mm512_permutevar_ps(four(LEVELS_2.as_ptr()), right(wide(0), 2 * group)),
                        3 => {
                            let code = right(wide(0), 2 * group);
                            let low = _mm512_permutevar_ps(four(LEVELS_3.as_ptr()), code);
                            _mm512_mask_permutevar_ps(low, mask(16 + 2 * group), four(LEVELS_3.as_ptr().add(4)), code)
                        }
                        4 => _mm512_permutexvar_ps(nibbles(), _mm512_loadu_ps(LEVELS_4.as_ptr())),
                        5 => {
                            let low = _mm512_permutexvar_ps(nibbles(), _mm512_loadu_ps(LEVELS_5.as_ptr()));
                            _mm512_mask_permutexvar_ps(low, mask(32 + 2 * group), nibbles(), _mm512_loadu_ps(LEVELS_5.as_ptr().add(16)))
                        }
                        6 => {
                            let high = right(wide(32), 2 * group);
                            let code = _mm512_or_si512(_mm512_and_si512(nibbles(), _mm512_set1_epi32(15)), _mm512_slli_epi32::<4>(high));
                            let part = |at: usize| _mm512_loadu_ps(LEVELS_6.as_ptr().add(at));
                            let low = _mm512_permutex2var_ps(part(0), code, part(16));
                            let top = _mm512_test_epi32_mask(high, _mm512_set1_epi32(2));
                            _mm512_mask_blend_ps(top, low, _mm512_permutex2var_ps(part(32), code, part(48)))
                        }
                        8 => {
                            let c = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(16 * group).cast())));
                            _mm512_mul_ps(c, _mm512_fmadd_ps(_mm512_mul_ps(c, c), _mm512_set1_ps(B_8), _mm512_set1_ps(A_8)))
                        }
                        _ => _mm512_setzero_ps(),
                    };
                    _mm512_storeu_ps(out.add(16 * group), value);
                }
            }
        }
    }
}
