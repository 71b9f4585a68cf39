//! What there is to kernels with AVX-512 F, BW, VL and DQ: floats. Tiles take the f32 way.
//!
//! Must not know what kernels are made of it.

use super::avx2::sums_ymm;
use super::lanes::{Lanes, EXP, EXP_RANGE};
use super::tiles_float::Unpack;
use crate::layout::quant::{A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6};
use crate::layout::TILE;
use half::f16;
use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};

/// AVX-512 F and DQ.
#[derive(Clone, Copy)]
pub struct Zmm(__m512);

// SAFETY, for all that is unsafe: the trait's contract; intrinsics have no other conditions than features and what pointers cover.
impl Lanes for Zmm {
    const N: usize = 16;
    const COLUMNS: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_half(p: *const f16) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self {
        // SAFETY: see above; the table has an entry for every byte.
        Zmm(unsafe { _mm512_i32gather_ps::<4>(_mm512_cvtepu8_epi32(_mm_loadu_si128(index.cast())), table.as_ptr()) })
    }
    #[inline(always)]
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2] {
        // SAFETY: see above; permutations look at the low four bits.
        unsafe {
            let (low, table) = (_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())), _mm512_loadu_ps(table.as_ptr()));
            [Zmm(_mm512_permutexvar_ps(low, table)), Zmm(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(low), table))]
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn times(self, x: Self) -> Self {
        // SAFETY: see above.
        Zmm(unsafe { _mm512_mul_ps(self.0, x.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_min_ps(_mm512_max_ps(self.0, _mm512_set1_ps(EXP_RANGE[0])), _mm512_set1_ps(EXP_RANGE[1]));
            let t = _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E));
            let whole = _mm512_roundscale_ps::<0>(t);
            let f = _mm512_mul_ps(_mm512_sub_ps(t, whole), _mm512_set1_ps(LN_2));
            let mut p = _mm512_set1_ps(EXP[0]);
            for c in &EXP[1..] {
                p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
            }
            let seen = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_set1_ps(f32::NEG_INFINITY));
            Zmm(_mm512_maskz_scalef_ps(seen, p, whole))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: see above.
        unsafe {
            let (mut a, mut b) = ([_mm512_setzero_ps(); 16], [_mm512_setzero_ps(); 16]);
            for (i, row) in a.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * stride));
            }
            // Pairs of rows, then fours, then the quarters of registers change places, eight rows and sixteen.
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                for k in 0..2 {
                    a[4 * i + 2 * k] = _mm512_shuffle_ps::<0x44>(b[4 * i + k], b[4 * i + k + 2]);
                    a[4 * i + 2 * k + 1] = _mm512_shuffle_ps::<0xee>(b[4 * i + k], b[4 * i + k + 2]);
                }
            }
            // Column `4 q + i` of rows `4 r` to `4 r + 3` is quarter `q` of `a[4 r + i]`.
            for i in 0..4 {
                b[i] = _mm512_shuffle_f32x4::<0x88>(a[i], a[i + 4]);
                b[i + 4] = _mm512_shuffle_f32x4::<0xdd>(a[i], a[i + 4]);
                b[i + 8] = _mm512_shuffle_f32x4::<0x88>(a[i + 8], a[i + 12]);
                b[i + 12] = _mm512_shuffle_f32x4::<0xdd>(a[i + 8], a[i + 12]);
            }
            for i in 0..4 {
                _mm512_storeu_ps(to.add(i * to_stride), _mm512_shuffle_f32x4::<0x88>(b[i], b[i + 8]));
                _mm512_storeu_ps(to.add((i + 4) * to_stride), _mm512_shuffle_f32x4::<0x88>(b[i + 4], b[i + 12]));
                _mm512_storeu_ps(to.add((i + 8) * to_stride), _mm512_shuffle_f32x4::<0xdd>(b[i], b[i + 8]));
                _mm512_storeu_ps(to.add((i + 12) * to_stride), _mm512_shuffle_f32x4::<0xdd>(b[i + 4], b[i + 12]));
            }
        }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: see above.
        unsafe {
            // Not by `map`: intrinsics in a closure of a function without their features may stay calls.
            let [a, b, c, d] = v;
            let a = _mm256_add_ps(_mm512_castps512_ps256(a.0), _mm512_extractf32x8_ps::<1>(a.0));
            let b = _mm256_add_ps(_mm512_castps512_ps256(b.0), _mm512_extractf32x8_ps::<1>(b.0));
            let c = _mm256_add_ps(_mm512_castps512_ps256(c.0), _mm512_extractf32x8_ps::<1>(c.0));
            let d = _mm256_add_ps(_mm512_castps512_ps256(d.0), _mm512_extractf32x8_ps::<1>(d.0));
            sums_ymm([a, b, c, d])
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
