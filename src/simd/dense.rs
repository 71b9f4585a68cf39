//! Dense kernels: products of small row-major matrices, and what softmax and rotation need. One body each, for every [`Lanes`].

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::lanes::{Lanes, LANES};
use crate::layout::quant::LEVELS_4;
use crate::layout::TILE;
use half::f16;

/// A row-major matrix that is only read: its floats and the distance from a row to the next.
#[derive(Clone, Copy)]
pub struct MatRef<'a> {
    /// The floats.
    pub data: &'a [f32],
    /// Floats from a row to the next.
    pub stride: usize,
}

impl<'a> MatRef<'a> {
    /// Rows of `stride` floats.
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        MatRef { data, stride }
    }
    /// Panics when `rows` of `columns` floats are not there: kernels read without looking.
    #[inline(always)]
    fn check(&self, rows: usize, columns: usize) {
        assert!(rows == 0 || columns <= self.stride && (rows - 1) * self.stride + columns <= self.data.len());
    }
}

/// A row-major matrix.
pub struct MatMut<'a> {
    /// The floats.
    pub data: &'a mut [f32],
    /// Floats from a row to the next.
    pub stride: usize,
}

impl<'a> MatMut<'a> {
    /// Rows of `stride` floats.
    pub fn new(data: &'a mut [f32], stride: usize) -> Self {
        MatMut { data, stride }
    }
    #[inline(always)]
    fn check(&self, rows: usize, columns: usize) {
        MatRef { data: self.data, stride: self.stride }.check(rows, columns);
    }
}

/// `c[R][C * N] += a[R][k] * b[k][C * N]`, accumulators in registers.
#[inline(always)]
unsafe fn block<V: Lanes, const R: usize, const C: usize>(a: *const f32, sa: usize, b: *const f32, sb: usize, c: *mut f32, sc: usize, k: usize) {
    // SAFETY: `multiply` checked that all of it is there; features are the caller's.
    unsafe {
        let mut acc = [[V::splat(0.0); C]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(c.add(r * sc + i * V::N));
            }
        }
        for j in 0..k {
            let mut row = [V::splat(0.0); C];
            for (i, x) in row.iter_mut().enumerate() {
                *x = V::load(b.add(j * sb + i * V::N));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*a.add(r * sa + j));
                for (acc, y) in acc.iter_mut().zip(row) {
                    *acc = acc.add_product(x, y);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (i, acc) in acc.into_iter().enumerate() {
                acc.store(c.add(r * sc + i * V::N));
            }
        }
    }
}

/// `c[n][m] += a[n][k] * b[k][m]`.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn multiply<V: Lanes>(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) {
    // SAFETY: features are the caller's.
    unsafe {
        match V::COLUMNS {
            1 => multiply_in_blocks::<V, 1>(a, b, c, n, k, m),
            2 => multiply_in_blocks::<V, 2>(a, b, c, n, k, m),
            _ => multiply_in_blocks::<V, 4>(a, b, c, n, k, m),
        }
    }
}

/// The same in register blocks that are `C` vectors wide.
#[inline(always)]
unsafe fn multiply_in_blocks<V: Lanes, const C: usize>(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) {
    a.check(n, k);
    b.check(k, m);
    c.check(n, m);
    let (pa, pb, pc) = (a.data.as_ptr(), b.data.as_ptr(), c.data.as_mut_ptr());
    let (sa, sb, sc) = (a.stride, b.stride, c.stride);
    let mut column = 0;
    while column + V::N <= m {
        let wide = m - column >= C * V::N;
        let mut row = 0;
        while row < n {
            // SAFETY: rows and columns are inside of what was checked.
            unsafe {
                let (a, b, c) = (pa.add(row * sa), pb.add(column), pc.add(row * sc + column));
                match (wide, n - row) {
                    (true, 1) => block::<V, 1, C>(a, sa, b, sb, c, sc, k),
                    (true, 2) => block::<V, 2, C>(a, sa, b, sb, c, sc, k),
                    (true, 3) => block::<V, 3, C>(a, sa, b, sb, c, sc, k),
                    (true, _) => block::<V, 4, C>(a, sa, b, sb, c, sc, k),
                    (false, 1) => block::<V, 1, 1>(a, sa, b, sb, c, sc, k),
                    (false, 2) => block::<V, 2, 1>(a, sa, b, sb, c, sc, k),
                    (false, 3) => block::<V, 3, 1>(a, sa, b, sb, c, sc, k),
                    (false, _) => block::<V, 4, 1>(a, sa, b, sb, c, sc, k),
                }
            }
            row += 4;
        }
        column += if wide { C * V::N } else { V::N };
    }
    for row in 0..n {
        for j in 0..if column < m { k } else { 0 } {
            let x = a.data[row * sa + j];
            for i in column..m {
                c.data[row * sc + i] += x * b.data[j * sb + i];
            }
        }
    }
}

/// `c[R][4] = a[R] . b[4]`; only the first `keep` columns are written.
#[inline(always)]
unsafe fn dot_block<V: Lanes, const R: usize>(a: *const f32, sa: usize, b: [*const f32; 4], c: *mut f32, sc: usize, k: usize, keep: usize) {
    // SAFETY: `dots` checked that all of it is there; features are the caller's.
    unsafe {
        let mut acc = [[V::splat(0.0); 4]; R];
        let mut j = 0;
        while j + V::N <= k {
            let y = [V::load(b[0].add(j)), V::load(b[1].add(j)), V::load(b[2].add(j)), V::load(b[3].add(j))];
            for r in 0..R {
                let x = V::load(a.add(r * sa + j));
                for i in 0..4 {
                    acc[r][i] = acc[r][i].add_product(x, y[i]);
                }
            }
            j += V::N;
        }
        for r in 0..R {
            let mut out = V::sums(acc[r]);
            for j in j..k {
                for i in 0..4 {
                    out[i] += *a.add(r * sa + j) * *b[i].add(j);
                }
            }
            for (i, out) in out.into_iter().enumerate().take(keep) {
                *c.add(r * sc + i) = out;
            }
        }
    }
}

/// `c[n][m] = a[n] . b[m]`, rows of `k` floats.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn dots<V: Lanes>(a: MatRef, b: MatRef, c: MatMut, n: usize, k: usize, m: usize) {
    a.check(n, k);
    b.check(m, k);
    c.check(n, m);
    let (pa, pb, pc) = (a.data.as_ptr(), b.data.as_ptr(), c.data.as_mut_ptr());
    let (sa, sb, sc) = (a.stride, b.stride, c.stride);
    let mut column = 0;
    while column < m {
        // Rows of `b` behind the last are the last again, and not written.
        let keep = (m - column).min(4);
        let mut row = 0;
        while row < n {
            // SAFETY: rows and columns are inside of what was checked.
            unsafe {
                let at = |i: usize| pb.add((column + i.min(keep - 1)) * sb);
                let (a, b, c) = (pa.add(row * sa), [at(0), at(1), at(2), at(3)], pc.add(row * sc + column));
                match n - row {
                    1 => dot_block::<V, 1>(a, sa, b, c, sc, k, keep),
                    2 => dot_block::<V, 2>(a, sa, b, c, sc, k, keep),
                    3 => dot_block::<V, 3>(a, sa, b, c, sc, k, keep),
                    _ => dot_block::<V, 4>(a, sa, b, c, sc, k, keep),
                }
            }
            row += 4;
        }
        column += 4;
    }
}

/// `out += sum_j coefficients[j] * matrix[j]` for rows of `out.len()` floats, any number of them.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn accumulate<V: Lanes>(matrix: &[f32], coefficients: &[f32], out: &mut [f32]) {
    let whole = out.len() / V::N * V::N;
    for (row, c) in matrix.chunks_exact(out.len()).zip(coefficients) {
        // SAFETY: `whole` floats are in both; features are the caller's.
        unsafe {
            let c = V::splat(*c);
            for i in (0..whole).step_by(V::N) {
                let p = out.as_mut_ptr().add(i);
                V::load(p).add_product(c, V::load(row.as_ptr().add(i))).store(p);
            }
        }
        for (out, x) in out[whole..].iter_mut().zip(&row[whole..]) {
            *out += c * x;
        }
    }
}

/// `x[i] = exp(x[i] - shift)`; returns the sum.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn exp_sum<V: Lanes>(x: &mut [f32], shift: f32) -> f32 {
    let whole = x.len() / V::N * V::N;
    let (x, rest) = x.split_at_mut(whole);
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    // SAFETY: vectors lie inside of slices; features are the caller's.
    unsafe {
        let (one, shift) = (V::splat(1.0), V::splat(-shift));
        let mut sum = V::splat(0.0);
        for x in x.chunks_exact_mut(V::N).chain(std::iter::once(&mut last[..V::N])) {
            let e = V::load(x.as_ptr()).add_product(one, shift).exp();
            e.store(x.as_mut_ptr());
            sum = sum.add_product(one, e);
        }
        rest.copy_from_slice(&last[..rest.len()]);
        let zero = V::splat(0.0);
        V::sums([sum, zero, zero, zero])[0]
    }
}

/// The largest of `x`.
#[inline(always)]
pub fn largest(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            lanes[i] = larger(x[i], lanes[i]);
        }
    }
    rest.iter().chain(&lanes).copied().fold(f32::NEG_INFINITY, larger)
}

/// `out[i] = scale * x[i]`; f16 as f32.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn widen<V: Lanes>(x: &[f16], scale: f32, out: &mut [f32]) {
    let n = x.len().min(out.len());
    let whole = n / V::N * V::N;
    for i in (0..whole).step_by(V::N) {
        // SAFETY: both have `whole` elements; features are the caller's.
        unsafe { V::load_half(x.as_ptr().add(i)).times(V::splat(scale)).store(out.as_mut_ptr().add(i)) }
    }
    for (out, x) in out[whole..n].iter_mut().zip(&x[whole..n]) {
        *out = scale * x.to_f32();
    }
}

/// `out[j][i] = a[i][j]` for `n` rows of `m` floats.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn transpose<V: Lanes>(a: MatRef, out: MatMut, n: usize, m: usize) {
    a.check(n, m);
    out.check(m, n);
    let (rows, columns) = (n / V::N * V::N, m / V::N * V::N);
    for i in (0..rows).step_by(V::N) {
        for j in (0..columns).step_by(V::N) {
            // SAFETY: the square is inside of what was checked; features are the caller's.
            unsafe { V::transpose(a.data.as_ptr().add(i * a.stride + j), a.stride, out.data.as_mut_ptr().add(j * out.stride + i), out.stride) }
        }
    }
    for i in 0..n {
        for j in if i < rows { columns } else { 0 }..m {
            out.data[j * out.stride + i] = a.data[i * a.stride + j];
        }
    }
}

/// Sums of every 16 floats.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn lane_sums<V: Lanes>(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(4 * LANES).zip(out.chunks_exact_mut(4)) {
        // SAFETY: four times 16 floats are there; features are the caller's.
        unsafe {
            let mut sums = [V::splat(0.0); 4];
            for (r, sum) in sums.iter_mut().enumerate() {
                for i in (0..LANES).step_by(V::N) {
                    *sum = sum.add_product(V::splat(1.0), V::load(x.as_ptr().add(r * LANES + i)));
                }
            }
            out.copy_from_slice(&V::sums(sums));
        }
    }
    let done = out.len() / 4 * 4;
    for (x, out) in x.chunks_exact(LANES).zip(out).skip(done) {
        *out = x.iter().sum();
    }
}

/// `x[i] = scale * (x[i] + offset)`; the largest in each lane are noted.
#[inline(always)]
pub fn scale_scores(x: &mut [f32; TILE], offset: f32, scale: f32, largest: &mut [f32; LANES]) {
    for x in x.as_chunks_mut::<LANES>().0 {
        for (x, largest) in x.iter_mut().zip(&mut *largest) {
            *x = (*x + offset) * scale;
            *largest = if *x > *largest { *x } else { *largest };
        }
    }
}

/// `out[i] = x[i] * gains[i]`; returns the sum of `x`.
#[inline(always)]
pub fn weigh(x: &[f32; TILE], gains: &[f32; TILE], out: &mut [f32; TILE]) -> f32 {
    let mut sum = [0.0; LANES];
    for ((x, gains), out) in x.as_chunks::<LANES>().0.iter().zip(gains.as_chunks::<LANES>().0).zip(out.as_chunks_mut::<LANES>().0) {
        for (((x, gain), out), sum) in x.iter().zip(gains).zip(out).zip(&mut sum) {
            *sum += *x;
            *out = x * gain;
        }
    }
    sum.into_iter().sum()
}

/// `out[i] = scale * level` of 4-bit codes: byte `k` has those of elements `k` and, in its high nibble, `n/2 + k`.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn unpack_fine<V: Lanes>(nibbles: &[u8], scale: f32, out: &mut [f32]) {
    let half = out.len().div_ceil(2);
    let (low, high) = out.split_at_mut(half);
    let nibbles = &nibbles[..half];
    let whole = high.len() / V::N * V::N;
    for i in (0..whole).step_by(V::N) {
        // SAFETY: all have `whole` elements; features are the caller's.
        unsafe {
            let [a, b] = V::nibbles(&LEVELS_4, nibbles.as_ptr().add(i));
            a.times(V::splat(scale)).store(low.as_mut_ptr().add(i));
            b.times(V::splat(scale)).store(high.as_mut_ptr().add(i));
        }
    }
    for (x, byte) in low[whole..].iter_mut().zip(&nibbles[whole..]) {
        *x = scale * LEVELS_4[usize::from(byte & 15)];
    }
    for (x, byte) in high[whole..].iter_mut().zip(&nibbles[whole..]) {
        *x = scale * LEVELS_4[usize::from(byte >> 4)];
    }
}

/// Rotate the pairs `(x[2i], x[2i+1])`.
#[inline(always)]
pub fn rotate_adjacent(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((p, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        *p = [p[0] * c - p[1] * s, p[1] * c + p[0] * s];
    }
}

/// Rotate the pairs `(a[i], b[i])`.
#[inline(always)]
pub fn rotate_halves(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Cosine and sine of `delta * omega[i]`: the angle is reduced in f64, by multiples of pi/2 (Cody and Waite 1980), the rest has Taylor
/// polynomials of degree 8 and 9 on [-pi/4, pi/4].
#[inline(always)]
pub fn turn(omega: &[f64], delta: f64, cos: &mut [f32], sin: &mut [f32]) {
    // Adding 1.5 * 2^52 rounds to a whole number, whose low bits are then those of the sum.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    for ((omega, cos), sin) in omega.iter().zip(cos).zip(sin) {
        let angle = delta * omega;
        let quarter = angle * std::f64::consts::FRAC_2_PI + ROUND;
        let turns = quarter - ROUND;
        // pi/2 in two parts, the first of which has 33 bits.
        let r = ((angle - turns * 1.570_796_326_734_125_6) - turns * 6.077_100_506_506_192e-11) as f32;
        let r2 = r * r;
        let s = r + r * r2 * (-1.0 / 6.0 + r2 * (1.0 / 120.0 + r2 * (-1.0 / 5040.0 + r2 / 362_880.0)));
        let c = 1.0 - r2 * (0.5 - r2 * (1.0 / 24.0 - r2 * (1.0 / 720.0 - r2 / 40_320.0)));
        let quadrant = quarter.to_bits() as u32;
        let (a, b) = if quadrant & 1 == 0 { (c, s) } else { (s, c) };
        *cos = if quadrant.wrapping_add(1) & 2 == 0 { a } else { -a };
        *sin = if quadrant & 2 == 0 { b } else { -b };
    }
}
