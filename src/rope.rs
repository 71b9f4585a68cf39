//! Rotary position embedding as a pure rotation: angles, rotation of one head, signed position differences.
//!
//! A rope is fully described by one angular frequency per pair: every variant that llama.cpp supports without sections
//! (linear scaling, YaRN, LongRoPE and Llama-3 frequency factors, partial rotation) turns pair `i` by `position * omega[i]`.
//! The magnitude factor of YaRN is a property of the keys that come in and is never undone or applied here.
//! Must not know about tiles, cells or arenas.

use crate::error::{argument, Result};
use crate::simd;

/// Which two elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// No rotation: keys are stored as they are.
    None,
    /// Elements `2i` and `2i+1` (ggml NORM).
    Adjacent,
    /// Elements `i` and `i + n_dims/2` (ggml NEOX).
    Halves,
}

/// Parameters as ggml's `GGML_OP_ROPE` carries them.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParams {
    /// Pair layout.
    pub pairing: Pairing,
    /// Rotated elements of a head.
    pub n_dims: usize,
    /// First rotated element.
    pub offset: usize,
    /// Context length the model was trained with (YaRN).
    pub n_ctx_orig: u32,
    /// Base of the geometric frequency series.
    pub freq_base: f32,
    /// Linear position scale.
    pub freq_scale: f32,
    /// YaRN extrapolation mix; 0 switches YaRN off.
    pub ext_factor: f32,
    /// YaRN: rotations above which a pair is extrapolated.
    pub beta_fast: f32,
    /// YaRN: rotations below which a pair is interpolated.
    pub beta_slow: f32,
    /// Per-pair divisors (Llama 3, LongRoPE); empty for none.
    pub freq_factors: Vec<f32>,
}

impl RopeParams {
    /// No rotation at all.
    pub fn none() -> Self {
        RopeParams {
            pairing: Pairing::None,
            n_dims: 0,
            offset: 0,
            n_ctx_orig: 0,
            freq_base: 10000.0,
            freq_scale: 1.0,
            ext_factor: 0.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            freq_factors: Vec::new(),
        }
    }

    /// Plain RoPE over a whole head of `n_dims` elements.
    pub fn plain(pairing: Pairing, n_dims: usize, freq_base: f32) -> Self {
        RopeParams { pairing, n_dims, freq_base, ..RopeParams::none() }
    }
}

/// A rotation by position: one angular frequency per pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pairing: Pairing,
    n_dims: usize,
    offset: usize,
    omega: Vec<f64>,
}

/// Cosines and sines of one position difference, one entry per pair.
#[derive(Debug, Clone, Default)]
pub struct Turn {
    cos: Vec<f32>,
    sin: Vec<f32>,
    identity: bool,
}

impl Rope {
    /// The identity rotation.
    pub fn identity() -> Self {
        Rope { pairing: Pairing::None, n_dims: 0, offset: 0, omega: Vec::new() }
    }

    /// Frequencies for heads of `d_k` elements. YaRN as in Peng et al., "YaRN" (2023), section 3, in ggml's parametrisation.
    pub fn new(p: &RopeParams, d_k: usize) -> Result<Self> {
        if p.pairing == Pairing::None {
            return Ok(Rope::identity());
        }
        if p.n_dims == 0 || !p.n_dims.is_multiple_of(2) || !p.offset.is_multiple_of(2) || p.n_dims > d_k || p.offset > d_k - p.n_dims {
            return argument(format!("rope rotates {} elements from {} in a head of {d_k}", p.n_dims, p.offset));
        }
        let scalars = [p.freq_base, p.freq_scale, p.ext_factor, p.beta_fast, p.beta_slow];
        if scalars.iter().any(|x| !x.is_finite()) || p.freq_base <= 0.0 || p.freq_scale <= 0.0 {
            return argument("rope frequency parameters must be finite, base and scale positive");
        }
        let pairs = p.n_dims / 2;
        if !p.freq_factors.is_empty() && (p.freq_factors.len() < pairs || p.freq_factors[..pairs].iter().any(|f| !f.is_finite() || *f == 0.0)) {
            return argument(format!("{} frequency factors for {pairs} pairs, or one of them is 0 or not finite", p.freq_factors.len()));
        }
        let (n, base) = (p.n_dims as f64, f64::from(p.freq_base));
        let corrected = |rotations: f64| n * (f64::from(p.n_ctx_orig) / (rotations * std::f64::consts::TAU)).ln() / (2.0 * base.ln());
        let (low, high) = if p.ext_factor != 0.0 {
            (corrected(f64::from(p.beta_fast)).floor().max(0.0), corrected(f64::from(p.beta_slow)).ceil().min(n - 1.0))
        } else {
            (0.0, 0.0)
        };
        let omega: Vec<f64> = (0..pairs)
            .map(|i| {
                let factor = p.freq_factors.get(i).map_or(1.0, |f| f64::from(*f));
                let extrapolated = base.powf(-2.0 * i as f64 / n) / factor;
                let interpolated = extrapolated * f64::from(p.freq_scale);
                let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                let mix = ramp * f64::from(p.ext_factor);
                interpolated * (1.0 - mix) + extrapolated * mix
            })
            .collect();
        if omega.iter().any(|w| !w.is_finite()) {
            return argument("rope parameters give frequencies that are not finite");
        }
        Ok(Rope { pairing: p.pairing, n_dims: p.n_dims, offset: p.offset, omega })
    }

    /// True when nothing is rotated.
    pub fn is_identity(&self) -> bool {
        self.pairing == Pairing::None
    }

    /// Which elements form a pair.
    pub fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// Rotated elements of a head.
    pub fn n_dims(&self) -> usize {
        self.n_dims
    }

    /// The first of them.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Radians per position of each pair.
    pub fn omega(&self) -> &[f64] {
        &self.omega
    }

    /// Everything that tells two ropes apart.
    pub fn to_bytes(&self) -> Vec<u8> {
        let ints = [self.pairing as u32, self.n_dims as u32, self.offset as u32];
        ints.into_iter().flat_map(u32::to_le_bytes).chain(self.omega.iter().flat_map(|w| w.to_le_bytes())).collect()
    }

    /// Angles for a signed position difference, computed, never looked up.
    pub fn turn(&self, delta: i64, out: &mut Turn) {
        out.identity = delta == 0 || self.is_identity();
        if out.identity {
            return;
        }
        out.cos.resize(self.omega.len(), 0.0);
        out.sin.resize(self.omega.len(), 0.0);
        (simd::kernels().turn)(&self.omega, delta as f64, &mut out.cos, &mut out.sin);
    }

    /// Rotate one head in place.
    pub fn rotate(&self, turn: &Turn, head: &mut [f32]) {
        if turn.identity {
            return;
        }
        let x = &mut head[self.offset..self.offset + self.n_dims];
        let pairs = self.n_dims / 2;
        match self.pairing {
            Pairing::None => {}
            Pairing::Adjacent => (simd::kernels().rotate_adjacent)(x, &turn.cos, &turn.sin),
            Pairing::Halves => {
                let (a, b) = x.split_at_mut(pairs);
                (simd::kernels().rotate_halves)(a, b, &turn.cos, &turn.sin);
            }
        }
    }

    /// Rotate many heads in place, all by the same turn: `columns` of them, coordinate by coordinate.
    pub fn rotate_columns(&self, turn: &Turn, heads: &mut [f32], columns: usize) {
        if turn.identity {
            return;
        }
        let x = &mut heads[self.offset * columns..(self.offset + self.n_dims) * columns];
        let rotate = |a: &mut [f32], b: &mut [f32], i: usize| {
            let (c, s) = (turn.cos[i], turn.sin[i]);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a * c - *b * s, *b * c + *a * s));
        };
        match self.pairing {
            Pairing::None => {}
            Pairing::Adjacent => x.chunks_exact_mut(2 * columns).enumerate().for_each(|(i, pair)| {
                let (a, b) = pair.split_at_mut(columns);
                rotate(a, b, i);
            }),
            Pairing::Halves => {
                let (a, b) = x.split_at_mut(self.n_dims / 2 * columns);
                a.chunks_exact_mut(columns).zip(b.chunks_exact_mut(columns)).enumerate().for_each(|(i, (a, b))| rotate(a, b, i));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_and_its_inverse_cancel_for_negative_and_large_differences() {
        for pairing in [Pairing::Adjacent, Pairing::Halves] {
            let rope = Rope::new(&RopeParams { offset: 4, ..RopeParams::plain(pairing, 16, 10000.0) }, 24).unwrap();
            for delta in [-131072i64, -65, -1, 0, 1, 63, 1_000_000] {
                let before: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
                let mut x = before.clone();
                let (mut there, mut back) = (Turn::default(), Turn::default());
                rope.turn(delta, &mut there);
                rope.turn(-delta, &mut back);
                rope.rotate(&there, &mut x);
                assert!(x[..4] == before[..4] && x[20..] == before[20..]);
                rope.rotate(&back, &mut x);
                for (a, b) in x.iter().zip(&before) {
                    assert!((a - b).abs() < 2e-6, "{pairing:?} {delta}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn columns_rotate_as_heads_do() {
        for pairing in [Pairing::None, Pairing::Adjacent, Pairing::Halves] {
            let rope = Rope::new(&RopeParams { offset: 4, ..RopeParams::plain(pairing, 16, 10000.0) }, 24).unwrap();
            for delta in [0, 1, -77] {
                let mut turn = Turn::default();
                rope.turn(delta, &mut turn);
                let mut heads: Vec<Vec<f32>> = (0..5).map(|h| (0..24).map(|i| ((i * 5 + h) as f32 * 0.7).sin()).collect()).collect();
                let mut columns: Vec<f32> = (0..24 * 5).map(|i| heads[i % 5][i / 5]).collect();
                rope.rotate_columns(&turn, &mut columns, 5);
                heads.iter_mut().for_each(|head| rope.rotate(&turn, head));
                assert!(columns.iter().enumerate().all(|(i, x)| *x == heads[i % 5][i / 5]), "{pairing:?} {delta}");
            }
        }
    }

    #[test]
    fn bad_parameters_are_refused() {
        let ok = RopeParams::plain(Pairing::Halves, 64, 10000.0);
        assert!(Rope::new(&ok, 64).is_ok());
        assert!(Rope::new(&ok, 32).is_err());
        assert!(Rope::new(&RopeParams { n_dims: 63, ..ok.clone() }, 64).is_err());
        assert!(Rope::new(&RopeParams { offset: 2, ..ok.clone() }, 64).is_err());
        assert!(Rope::new(&RopeParams { freq_base: f32::NAN, ..ok.clone() }, 64).is_err());
        assert!(Rope::new(&RopeParams { freq_factors: vec![1.0; 3], ..ok.clone() }, 64).is_err());
        assert!(Rope::new(&RopeParams { freq_factors: vec![0.0; 32], ..ok }, 64).is_err());
    }
}
