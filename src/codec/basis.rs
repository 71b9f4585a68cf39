//! The transform of one head, K or V, and its stored form.
//!
//! A row less its mean (values have none) becomes coefficients of unit variance, in the order of the variance that they stand for; each band codes
//! the first few. All coefficients are kept, because the residual of fine rows is coded in all of them. Must not know how coefficients are coded.

use crate::error::{Error, Result};
use crate::layout::basis::{bytes_of, decoder_bytes_of, widths_of, HAS_MEAN, HEADER_BYTES};
use crate::layout::{quant, stored_f16s, Widths, BANDS};
use crate::simd::{self, MatMut, MatRef};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What is fitted for one head, K or V.
#[derive(Debug, Clone, Default)]
pub struct Basis {
    /// Elements of a head.
    pub d: usize,
    /// Coefficients by width, for each band.
    pub widths: [Widths; BANDS],
    /// Mean of the rows; empty where rows are not centred.
    pub mean: Vec<f32>,
    /// `d x d`: row `j` gives coefficient `j` with unit variance from a row less the mean.
    pub encode: Vec<f32>,
    /// `d x d`: what a unit of coefficient `j` adds to a row.
    pub decode: Vec<f32>,
    /// Importance of a squared error in coefficient `j`.
    pub weight: Vec<f32>,
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("invariant: four bytes"))
}

fn put_f32(bytes: &mut [u8], i: usize, x: f32) {
    bytes[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}

/// What the elements of a row are divided by to be kept in f16: its largest becomes 1, so that no magnitude leaves the range.
pub(super) fn row_scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0f32, |a, x| a.max(x.abs())).max(f32::MIN_POSITIVE)
}

impl Basis {
    /// Each element by itself in so many bits, less `mean` (nothing for values) and divided by `scale`: for rows that wait for a fit. All bands are
    /// the same.
    pub fn diagonal(mean: &[f32], scale: &[f32], bits: u32) -> Self {
        let d = scale.len();
        let diagonal = |x: &dyn Fn(f32) -> f32| {
            let mut matrix = vec![0.0; d * d];
            matrix.iter_mut().step_by(d + 1).zip(scale).for_each(|(out, scale)| *out = x(*scale));
            matrix
        };
        let largest = row_scale(scale);
        Basis {
            d,
            widths: [Widths::equal(d, bits); BANDS],
            mean: mean.to_vec(),
            encode: diagonal(&|scale| if scale > 0.0 { scale.recip() } else { 0.0 }),
            decode: diagonal(&|scale| scale),
            weight: scale.iter().map(|s| (s / largest).powi(2).max(f32::MIN_POSITIVE)).collect(),
        }
    }

    /// Write in stored form ([`crate::layout::basis`]).
    pub fn store(&self, bytes: &mut [u8]) {
        let d = self.d;
        bytes.fill(0);
        for (i, n) in self.widths.iter().flat_map(|w| w.counts).enumerate() {
            bytes[2 * i..2 * i + 2].copy_from_slice(&(n as u16).to_le_bytes());
        }
        bytes[HAS_MEAN] = u8::from(!self.mean.is_empty());
        let (floats, matrices) = bytes[HEADER_BYTES..].split_at_mut(16 * d);
        for (i, m) in self.mean.iter().enumerate() {
            put_f32(floats, i, *m);
        }
        let (mut scaled, mut halves) = (Vec::with_capacity(d), vec![f16::ZERO; d]);
        for (part, rows) in [&self.decode, &self.encode].into_iter().enumerate() {
            for (j, row) in rows.chunks_exact(d).enumerate() {
                let largest = row_scale(row);
                put_f32(floats, (1 + part) * d + j, largest);
                let at = 2 * d * (part * d + j);
                scaled.clear();
                scaled.extend(row.iter().map(|x| x / largest));
                halves.convert_from_f32_slice(&scaled);
                matrices[at..at + 2 * d].chunks_exact_mut(2).zip(&halves).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
            }
        }
        for (j, w) in self.weight.iter().enumerate() {
            put_f32(floats, 3 * d + j, *w);
        }
    }

    /// Read the stored form of a basis for heads of `d` elements, reusing this object's buffers.
    /// `with_encoder` false leaves out what only coding needs.
    pub fn load(&mut self, bytes: &[u8], d: usize, with_encoder: bool) -> Result<()> {
        self.read(bytes, d, [true, with_encoder])
    }

    /// [`Basis::load`] of what coding rows needs, and no more.
    pub fn load_encoder(&mut self, bytes: &[u8], d: usize) -> Result<()> {
        self.read(bytes, d, [false, true])
    }

    /// The share of a row's energy, by importance, that a band would lose of it, going by the widths of the coefficients alone.
    pub fn relative_error(&self, band: usize, x: &[f32]) -> f32 {
        let d = self.d;
        let (mut centred, mut z) = (x.to_vec(), vec![0.0; d]);
        centred.iter_mut().zip(&self.mean).for_each(|(x, mean)| *x -= mean);
        (simd::kernels().dots)(MatRef::new(&centred, d), MatRef::new(&self.encode, d), MatMut::new(&mut z, d), 1, d, d);
        let (mut lost, mut all) = (0.0, f32::MIN_POSITIVE);
        for (j, (z, weight)) in z.iter().zip(&self.weight).enumerate() {
            let energy = weight * z * z;
            (lost, all) = (lost + energy * quant::distortion(self.widths[band].place(j).0) as f32, all + energy);
        }
        lost / all
    }

    fn read(&mut self, bytes: &[u8], d: usize, wanted: [bool; 2]) -> Result<()> {
        let need = if wanted[1] { bytes_of(d) } else { decoder_bytes_of(d) };
        if bytes.len() < need {
            return Err(Error::Data(format!("a basis for heads of {d} elements in {} bytes", bytes.len())));
        }
        (self.d, self.widths) = (d, widths_of(bytes));
        if let Some(w) = self.widths.iter().find(|w| w.rank() > d) {
            return Err(Error::Data(format!("a basis of rank {} for heads of {d} elements", w.rank())));
        }
        let (floats, matrices) = bytes[HEADER_BYTES..].split_at(16 * d);
        self.mean.clear();
        self.mean.extend((0..if bytes[HAS_MEAN] == 0 { 0 } else { d }).map(|i| f32_at(floats, i)));
        self.weight.clear();
        self.weight.extend((0..d).map(|j| f32_at(floats, 3 * d + j)));
        for (part, rows) in [&mut self.decode, &mut self.encode].into_iter().enumerate() {
            if !wanted[part] {
                rows.clear();
                continue;
            }
            rows.resize(d * d, 0.0);
            let from = 2 * d * part * d;
            let stored = stored_f16s(&matrices[from..from + 2 * d * d])?;
            for (j, (row, stored)) in rows.chunks_exact_mut(d).zip(stored.chunks_exact(d)).enumerate() {
                (simd::kernels().widen)(stored, f32_at(floats, (1 + part) * d + j), row);
            }
        }
        Ok(())
    }
}
