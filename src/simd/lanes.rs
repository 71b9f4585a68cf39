//! A vector of floats, so that a kernel is written once and compiled for each instruction-set level.
//!
//! Functions are `unsafe` because an implementation may need CPU features: call them only from a function compiled for these.
//! Pointers need no alignment. Must not know about codes or attention.

use half::f16;
use std::f32::consts::{LN_2, LOG2_E};

/// Lanes of every accumulator that kernels leave in memory, whatever a level's own width is.
pub const LANES: usize = 16;

/// Taylor coefficients of exp, highest degree first.
const EXP: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
/// Arguments of exp outside of these give no normal numbers.
const EXP_RANGE: [f32; 2] = [-87.0, 88.0];
/// Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
pub const ROUND: f32 = 12_582_912.0;

/// Some floats in a register.
pub trait Lanes: Copy {
    /// How many.
    const N: usize;
    /// # Safety
    /// The level's features are there.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As [`Lanes::splat`]; `N` floats are readable.
    unsafe fn load(p: *const f32) -> Self;
    /// Widens f16.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` halves are readable.
    unsafe fn load_half(p: *const f16) -> Self;
    /// `table[index]` for each of `N` bytes.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` bytes are readable.
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self;
    /// `table[nibble]` for the low and the high nibbles of `N` bytes.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` bytes are readable.
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2];
    /// # Safety
    /// As [`Lanes::splat`]; `N` floats are writable.
    unsafe fn store(self, p: *mut f32);
    /// `self + a * b`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// `self * x`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn times(self, x: Self) -> Self;
    /// exp by 2^n * 2^f with a degree-6 polynomial for 2^f on [-1/2, 1/2] (Taylor, relative error under 2e-7); 0 for minus infinity. Under -87 the
    /// result is not a normal number, so what is given is unimportant.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn exp(self) -> Self;
    /// Transpose `N` rows of `N` floats. Arguments: the first row and the distance to the next, the same of the result.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; the rows are readable, and those of the result writable.
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize);
    /// Sums over the lanes of four vectors.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn sums(v: [Self; 4]) -> [f32; 4];
}

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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, EXP, EXP_RANGE, LN_2, LOG2_E, ROUND};
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub struct Ymm(__m256);

    #[inline(always)]
    unsafe fn sums_ymm(v: [__m256; 4]) -> [f32; 4] {
        // SAFETY: the caller's contract: AVX2.
        unsafe {
            let low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let sum = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
            std::mem::transmute::<__m128, [f32; 4]>(sum)
        }
    }

    // SAFETY, for both: the trait's contract; intrinsics have no other conditions than features and what pointers cover.
    impl Lanes for Ymm {
        const N: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: see above.
            Ymm(unsafe { _mm256_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: see above.
            Ymm(unsafe { _mm256_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn load_half(p: *const f16) -> Self {
            // SAFETY: see above.
            Ymm(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
        }
        #[inline(always)]
        unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self {
            // SAFETY: see above; the table has an entry for every byte.
            Ymm(unsafe { _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_cvtepu8_epi32(_mm_loadl_epi64(index.cast()))) })
        }
        #[inline(always)]
        unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2] {
            // SAFETY: see above.
            unsafe {
                let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
                let (first, second) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
                let mut out = [Ymm(_mm256_setzero_ps()); 2];
                for (out, code) in out.iter_mut().zip([low, _mm256_srli_epi32::<4>(low)]) {
                    // Permutations look at the low three bits, a blend at the sign: the fourth bit.
                    let halves = [_mm256_permutevar8x32_ps(first, code), _mm256_permutevar8x32_ps(second, code)];
                    *out = Ymm(_mm256_blendv_ps(halves[0], halves[1], _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code))));
                }
                out
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            Ymm(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
        }
        #[inline(always)]
        unsafe fn times(self, x: Self) -> Self {
            // SAFETY: see above.
            Ymm(unsafe { _mm256_mul_ps(self.0, x.0) })
        }
        #[inline(always)]
        unsafe fn exp(self) -> Self {
            // SAFETY: see above.
            unsafe {
                let x = _mm256_min_ps(_mm256_max_ps(self.0, _mm256_set1_ps(EXP_RANGE[0])), _mm256_set1_ps(EXP_RANGE[1]));
                let t = _mm256_mul_ps(x, _mm256_set1_ps(LOG2_E));
                let rounded = _mm256_add_ps(t, _mm256_set1_ps(ROUND));
                let f = _mm256_mul_ps(_mm256_sub_ps(t, _mm256_sub_ps(rounded, _mm256_set1_ps(ROUND))), _mm256_set1_ps(LN_2));
                let mut p = _mm256_set1_ps(EXP[0]);
                for c in &EXP[1..] {
                    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
                }
                let e = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded)));
                Ymm(_mm256_and_ps(_mm256_castsi256_ps(e), _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, _mm256_set1_ps(f32::NEG_INFINITY))))
            }
        }
        #[inline(always)]
        unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: see above.
            unsafe {
                let (mut a, mut b) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
                for (i, row) in a.iter_mut().enumerate() {
                    *row = _mm256_loadu_ps(from.add(i * stride));
                }
                // Pairs of rows, then fours, then the halves of registers change places.
                for i in 0..4 {
                    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
                }
                for i in 0..2 {
                    for k in 0..2 {
                        a[4 * i + 2 * k] = _mm256_shuffle_ps::<0x44>(b[4 * i + k], b[4 * i + k + 2]);
                        a[4 * i + 2 * k + 1] = _mm256_shuffle_ps::<0xee>(b[4 * i + k], b[4 * i + k + 2]);
                    }
                }
                for i in 0..4 {
                    _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(a[i], a[i + 4]));
                    _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(a[i], a[i + 4]));
                }
            }
        }
        #[inline(always)]
        unsafe fn sums(v: [Self; 4]) -> [f32; 4] {
            // SAFETY: see above.
            unsafe { sums_ymm([v[0].0, v[1].0, v[2].0, v[3].0]) }
        }
    }

    /// AVX-512 F and DQ.
    #[derive(Clone, Copy)]
    pub struct Zmm(__m512);

    impl Lanes for Zmm {
        const N: usize = 16;
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
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Ymm, Zmm};
