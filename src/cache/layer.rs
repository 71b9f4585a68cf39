//! One layer: its heads, rotation and scoring, and in which order a plan is carried out on a head. Tiles and slots are filled in [`super::store`], what a
//! fit takes is in [`super::fit`] and [`super::sample`], attention in [`super::attend`].
//!
//! A layer is immutable but for its counters and what it finds; arenas are passed in. Work is cut so that every piece touches bytes of its own:
//! storing by KV head, attention by (KV head, chunk of rows), rebuilding by range of cells. Must not know how a plan is made.

use super::arena::BytesMut;
use super::findings::Findings;
use super::input::{Rows, Step};
use super::plan::{self, Change, Plan};
use super::stats::Counters;
use super::{arena, findings};
use crate::codec::calibration::Calibration;
use crate::config::Scoring;
use crate::error::{argument, Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::{Heads, MAX_QUERIES, TILE};
use crate::rope::{Rope, RopeParams};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Layer {
    pub(super) geometry: Arc<Geometry>,
    pub(super) index: usize,
    pub(super) rope: Rope,
    pub(super) scoring: Scoring,
    /// A calibration was taken.
    pub(super) calibrated: bool,
    /// Rows were stored in some arena.
    used: AtomicBool,
    /// The layer's first KV head, counted over all layers.
    pub(super) first_head: usize,
    /// What fits find in the heads of all layers.
    pub(super) findings: Arc<Findings>,
    /// What this layer has done.
    pub counters: Counters,
}

impl Layer {
    /// Layer `index` of a geometry; keys are stored un-rotated until a rope is set. All layers of a cache share their findings.
    pub fn new(geometry: Arc<Geometry>, findings: Arc<Findings>, index: usize) -> Result<Self> {
        crate::simd::check_level()?;
        let Some(h) = geometry.layers.get(index) else {
            return argument(format!("layer {index} of {}", geometry.layers.len()));
        };
        let scoring = Scoring { scale: 1.0 / (h.d_k as f32).sqrt(), softcap: 0.0 };
        Ok(Layer {
            rope: Rope::identity(),
            scoring,
            calibrated: false,
            used: AtomicBool::new(false),
            first_head: geometry.first_head(index),
            findings,
            counters: Counters::default(),
            geometry,
            index,
        })
    }

    /// Heads of this layer.
    pub fn shape(&self) -> &Heads {
        &self.geometry.layers[self.index]
    }

    /// Its number in the geometry.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The geometry this layer belongs to.
    pub fn geometry(&self) -> &Arc<Geometry> {
        &self.geometry
    }

    /// Set the rotation of this layer's keys; once any row was stored it cannot change.
    pub fn set_rope(&mut self, params: &RopeParams) -> Result<()> {
        let rope = Rope::new(params, self.shape().d_k)?;
        if rope != self.rope && self.used.load(Relaxed) {
            return Err(Error::State("the rope changed after rows were stored".into()));
        }
        self.calibrated &= rope == self.rope;
        self.rope = rope;
        Ok(())
    }

    /// Take the bases from layer `model_layer` of a calibration instead of fitting them. The rope must have been set. Bits are shared out when
    /// all layers have theirs.
    pub fn set_calibration(&mut self, calibration: &Calibration, model_layer: usize) -> Result<()> {
        if !self.geometry.config.calibrated {
            return Err(Error::State("the cache was not configured for a calibration".into()));
        }
        for (head, found) in calibration.layer(model_layer, self.shape(), &self.rope)?.heads.iter().enumerate() {
            self.findings.add(&self.geometry, findings::CALIBRATED, self.first_head + head, found.clone());
        }
        self.calibrated = true;
        Ok(())
    }

    /// The rotation of this layer's keys.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Set scale and soft cap of the scores: the fit weighs errors with them. The default scale is `1/sqrt(d_k)`.
    pub fn set_scoring(&mut self, scoring: Scoring) -> Result<()> {
        scoring.check()?;
        self.scoring = scoring;
        Ok(())
    }

    /// Scale and soft cap of the scores.
    pub fn scoring(&self) -> Scoring {
        self.scoring
    }

    pub(super) fn check_rows(&self, plan: &Plan, rows: &[&Rows]) -> Result<()> {
        match rows.iter().find(|r| r.len() != plan.tokens().len()) {
            Some(r) => argument(format!("{} rows for a plan of {} tokens", r.len(), plan.tokens().len())),
            None => Ok(()),
        }
    }

    pub(super) fn check_arena(&self, arena: &[u8]) -> Result<()> {
        let need = self.geometry.arena_bytes;
        if arena.len() < need {
            return Err(Error::Buffer { need, have: arena.len() });
        }
        Ok(())
    }

    fn check_step(&self, heads: Range<usize>, plan: &Plan, step: &Step) -> Result<()> {
        let g = self.shape();
        self.check_rows(plan, &[&step.q, &step.k, &step.v])?;
        if let Some((residual, _)) = &step.residual {
            self.check_rows(plan, &[residual])?;
        }
        for (head, i) in heads.flat_map(|h| (0..step.k.len()).map(move |i| (h, i))) {
            for (x, d, name) in [(&step.k, g.d_k, "key"), (&step.v, g.d_v, "value")] {
                if !x.is_finite(i, head, d) {
                    return Err(Error::NotFinite(format!("{name} of token {i} of the step, KV head {head}, in f16")));
                }
            }
        }
        Ok(())
    }

    /// Store one KV head's part of a step, unless the step fits by itself ([`Layer::append_fit`]). What the projection has to do with it
    /// [`Layer::wants_projection`] says.
    pub fn append_head(&self, head: usize, bytes: &mut impl BytesMut, plan: &Plan, step: &Step) -> Result<()> {
        self.check_step(head..head + 1, plan, step)?;
        if plan.fit && !plan.shared {
            return Err(Error::State("a step that fits by itself is stored whole".into()));
        }
        if head == 0 {
            self.count_append(plan);
        }
        if plan.studies(self.first_head + head) {
            let found = self.study_head(head, bytes, plan, Some(step))?;
            self.findings.add(&self.geometry, plan.study.id, self.first_head + head, found);
        }
        self.write_and_store(head, bytes, plan, Some(step))
    }

    /// What a plan does to a head, when it needs no study.
    fn write_and_store(&self, head: usize, bytes: &mut impl BytesMut, plan: &Plan, step: Option<&Step>) -> Result<()> {
        if plan.fit {
            if plan.fitted {
                arena::keep_former(self.shape(), bytes, &self.geometry.head(self.index, head));
            }
            self.write_shared_bases(head, bytes, plan, step)?;
        }
        self.store(head, bytes, plan, step)
    }

    /// Store a whole step that studies all heads and fits the bases. One thread.
    pub fn append_fit(&self, arena: &mut [u8], plan: &Plan, step: &Step) -> Result<()> {
        self.check_step(0..self.shape().n_head_kv, plan, step)?;
        self.count_append(plan);
        self.fit_and_store(arena, plan, Some(step))
    }

    /// Rows are about to be stored: the rope stays as it is.
    pub fn mark_used(&self) {
        self.used.store(true, Relaxed);
    }

    fn count_append(&self, plan: &Plan) {
        self.mark_used();
        // Below zero it is one that is over, or was given up.
        if plan.study.id < 0 {
            self.findings.forget(plan.study.id.wrapping_neg());
        }
        let c = &self.counters;
        let tokens = plan.tokens().len() as u64;
        let prefill = tokens > MAX_QUERIES as u64;
        let sealed = if prefill { &c.sealed_prefill } else { &c.sealed_decode };
        if prefill { &c.appended_prefill } else { &c.appended_decode }.fetch_add(tokens, Relaxed);
        for change in plan.changes() {
            match change {
                Change::Move { .. } => c.moved.fetch_add(1, Relaxed),
                Change::Recode { .. } => c.recoded.fetch_add(TILE as u64, Relaxed),
                Change::Seal { .. } => sealed.fetch_add(TILE as u64, Relaxed),
            };
        }
        c.fits.fetch_add(u64::from(plan.fit), Relaxed);
    }

    /// After a graph that stopped part-way: do what the plan does to rows already stored, unless this arena has done it.
    /// New tokens are gone; tile rows meant for them hold nothing that anyone reads. A fit's sample is the rows stored before the
    /// step; with too few of them nothing is done, and the table forgets its rows. Single-threaded.
    pub fn replay(&self, mut arena: &mut [u8], plan: &Plan) -> Result<()> {
        let has_run = |arena: &[u8], head: usize| arena::epoch(&arena[self.geometry.head(self.index, head).record]) == plan.epoch;
        if plan.fit && !plan.shared {
            let lost = plan::replay_is_lost(&self.geometry, false, plan.fit_rows().map(|(r, ..)| r.source));
            return if has_run(arena, 0) || lost { Ok(()) } else { self.fit_and_store(arena, plan, None) };
        }
        for head in 0..self.shape().n_head_kv {
            if !has_run(arena, head) {
                self.write_and_store(head, &mut arena, plan, None)?;
            }
        }
        Ok(())
    }
}
