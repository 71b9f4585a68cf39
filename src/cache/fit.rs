//! What a layer does for a fit: heads are studied, bases are written for the bits that each head gets, and layers watch how well these fit later rows.
//!
//! Must not know when a fit is due, nor how a head is analysed.

use super::arena::{self, Bytes, BytesMut, ExactRows};
use super::findings::{self, Share};
use super::input::Step;
use super::layer::Layer;
use super::plan::{Plan, SealRow, Source};
use crate::codec::fit::{self, HeadSpectrum, Place, Residual, Sample};
use crate::codec::Basis;
use crate::error::{Error, Result};
use crate::layout::{basis, BANDS};
use crate::simd;
use std::sync::Arc;

impl Layer {
    /// What a head's rows and queries say. Without a step, its own rows and queries are missing.
    pub(super) fn study_head(&self, head: usize, bytes: &impl Bytes, plan: &Plan, step: Option<&Step>) -> Result<HeadSpectrum> {
        let (g, r) = (self.shape(), self.geometry.head(self.index, head));
        let projection = step.map_or(&[][..], |s| s.projection);
        self.check_projection(projection, head)?;
        let from: Vec<(SealRow, i32, i32)> = plan.fit_rows().filter(|(r, ..)| step.is_some() || !matches!(r.source, Source::Token(_))).collect();
        let mut own = self.fetch_sample(head, bytes, &r, plan, &from, step)?;
        let (queries, residual) = self.fetch_queries(head, bytes, &r, plan, step, &mut own.q)?;
        let rows: Vec<Place> = from.iter().map(|(_, pos, seq)| Place { pos: *pos, seq: *seq }).collect();
        // A coded row turns out of its frame, an exact one into it.
        let into = |row: &SealRow| if matches!(row.source, Source::Coded(_)) { row.turn.wrapping_neg() } else { row.turn };
        let turns: Vec<i32> = from.iter().map(|(row, ..)| into(row)).collect();
        let config = &self.geometry.config;
        let sample = Sample {
            rows: &rows,
            turns: &turns,
            queries: &queries,
            residual: if residual.iter().all(|x| *x > 0.0) { Residual::Before(&residual) } else { Residual::Unknown },
            projection,
            scale: self.scoring.scale,
            softcap: self.scoring.softcap,
            window: config.window as i32,
            sinks: config.sinks as i32,
            n_cells: i64::from(config.n_cells),
            bits: self.geometry.code_bits(BANDS - 1),
        };
        fit::analyse(simd::kernels(), g, &self.rope, &sample, head, &own)
    }

    /// Whether storing the heads `ith, ith + nth, ..` of this plan needs the output projection; a step that fits by itself is the first thread's.
    pub fn wants_projection(&self, plan: &Plan, ith: usize, nth: usize) -> bool {
        if plan.fit && !plan.shared {
            return ith == 0;
        }
        (ith..self.shape().n_head_kv).step_by(nth).any(|head| plan.studies_again() || plan.studies(self.first_head + head))
    }

    /// Study all heads of this layer, share its bits out among them, and store the step.
    pub(super) fn fit_and_store(&self, mut arena: &mut [u8], plan: &Plan, step: Option<&Step>) -> Result<()> {
        let known = |head: usize| self.findings.head(plan.study.id, self.first_head + head).0;
        let look = |head: usize| known(head).map_or_else(|| self.study_head(head, &arena, plan, step).map(Arc::new), Ok);
        let found = (0..self.shape().n_head_kv).map(look).collect::<Result<Vec<_>>>()?;
        let borrowed: Vec<_> = found.iter().map(|f| &**f).collect();
        let shares = findings::shares(&self.geometry, self.index..self.index + 1, &borrowed);
        for (head, (found, share)) in found.iter().zip(shares).enumerate() {
            self.write_bases(head, &mut arena, found, &share, plan)?;
            self.store(head, &mut arena, plan, step)?;
        }
        Ok(())
    }

    /// Write a head's bases, when all heads were studied before, and bits were shared out by what was found.
    pub(super) fn write_shared_bases(&self, head: usize, bytes: &mut impl BytesMut, plan: &Plan, step: Option<&Step>) -> Result<()> {
        if self.geometry.config.calibrated && !self.calibrated {
            return Err(Error::State("no calibration was set for this layer".into()));
        }
        let id = if self.geometry.config.calibrated { findings::CALIBRATED } else { plan.study.id };
        let (Some(found), Some(share)) = self.findings.head(id, self.first_head + head) else {
            return Err(Error::State("not all layers have been studied for the fit".into()));
        };
        let again = step.filter(|_| plan.studies_again()).map(|step| self.study_head(head, bytes, plan, Some(step))).transpose()?;
        self.write_bases(head, bytes, again.as_ref().unwrap_or(&found), &share, plan)
    }

    /// Write a head's bases for its share of the bits, where its pieces of tiles are, and what error the rows in its window would have.
    fn write_bases(&self, head: usize, bytes: &mut impl BytesMut, found: &HeadSpectrum, share: &Share, plan: &Plan) -> Result<()> {
        let (g, r) = (self.shape(), self.geometry.head(self.index, head));
        let (k, v) = found.bases(share.bits);
        let (bk, bv) = bytes.get_mut(r.bases).split_at_mut(basis::bytes_of(g.d_k));
        k.store(bk);
        v.store(bv);
        let rows = ExactRows::new(g, bytes.get(r.exact))?;
        let (mut value, mut sum, mut n) = (vec![0.0; g.d_v], 0.0, 0);
        for (slot, ..) in plan.exact().step_by(4) {
            (simd::kernels().widen)(&rows.row(slot)[g.d_k..], 1.0, &mut value);
            (sum, n) = (sum + v.relative_error(BANDS - 1, &value), n + 1);
        }
        let record = bytes.get_mut(r.record);
        arena::set_pieces(record, share.offset);
        // What hardly moved was coded better than others will need.
        let least = 0.25 * 4f32.powf(-(share.bits[BANDS - 1][1] as f32) / g.d_v as f32);
        arena::set_promise(record, if n > 0 { (sum / n as f32).max(least) } else { 0.0 });
        Ok(())
    }

    /// Note how well some of the step's values would be coded, against what it was at the fit.
    pub(super) fn watch(&self, head: usize, bytes: &impl Bytes, plan: &Plan, step: &Step) -> Result<()> {
        let (g, r) = (self.shape(), self.geometry.head(self.index, head));
        let promise = arena::promise(bytes.get(r.record));
        if promise <= 0.0 {
            return Ok(());
        }
        let mut encoder = Basis::default();
        encoder.load_encoder(&bytes.get(r.bases)[basis::bytes_of(g.d_k)..], g.d_v)?;
        for (token, _) in plan.recents() {
            let error = encoder.relative_error(BANDS - 1, step.v.head(token, head, g.d_v));
            self.findings.add_drift(plan.stream, f64::from(error / promise));
        }
        Ok(())
    }
}
