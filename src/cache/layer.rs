//! What one layer does with its arenas: store, fit and rebuild, each as the plan says. Attention is in [`super::attend`] and, for long steps, in
//! [`super::prefill`]. What is found and coded for a fit in the steps before it waits on the heap until then.
//!
//! A layer is immutable but for its counters; arenas are passed in. Work is cut so that every piece touches bytes of its own:
//! storing by KV head, attention by (KV head, chunk of rows), rebuilding by range of cells. Must not know how a plan is made,
//! nor about threads.

use super::arena::{self, ExactRows};
use super::plan::{self, Change, Changes, Plan, SealRow, Source};
use crate::attention::Scoring;
use crate::codec::fit::{self, HeadRows, HeadSpectrum, Spectrum};
use crate::codec::{self, calibration::Calibration, Basis, TileMap, TileWork};
use crate::config::{Geometry, LayerGeometry, MAX_QUERIES, TILE};
use crate::error::{argument, Error, Result};
use crate::rope::{Rope, RopeParams, Turn};
use crate::simd::{self, Kernels};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

/// Rows of queries, keys or values of one ubatch, f32, with strides in floats.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    data: &'a [f32],
    n: usize,
    row_stride: usize,
    head_stride: usize,
}

impl<'a> Rows<'a> {
    /// `n` rows of `heads` heads of `d` elements. Checks that all of it lies in `data`.
    pub fn new(data: &'a [f32], n: usize, row_stride: usize, head_stride: usize, heads: usize, d: usize) -> Result<Self> {
        let need = if n == 0 { 0 } else { (n - 1) * row_stride + (heads - 1) * head_stride + d };
        if data.len() < need {
            return Err(Error::Buffer { need, have: data.len() });
        }
        Ok(Rows { data, n, row_stride, head_stride })
    }
    /// No rows.
    pub fn empty() -> Self {
        Rows { data: &[], n: 0, row_stride: 0, head_stride: 0 }
    }
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.n
    }
    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }
    /// True when one head of a row is finite, in f16 as well.
    pub fn is_finite(&self, row: usize, head: usize, d: usize) -> bool {
        const LARGEST: f32 = f16::MAX.to_f32_const();
        // No early end: a loop that may stop is not made of vectors.
        self.head(row, head, d).iter().fold(true, |finite, x| finite & (x.abs() <= LARGEST))
    }
    pub(super) fn head(&self, row: usize, head: usize, d: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + head * self.head_stride..][..d]
    }
}

/// The visibility of cells for each query token.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// Every row is visible.
    All,
    /// ggml's: f16, one row per token, `stride` elements apart; 0 shows, -inf hides, other values are added. Cells from
    /// `n_kv` on are hidden.
    F16 {
        /// Rows of the mask.
        values: &'a [f16],
        /// Elements from a row to the next.
        stride: usize,
        /// Cells covered.
        n_kv: usize,
    },
    /// The same in f32.
    F32 {
        /// Rows of the mask.
        values: &'a [f32],
        /// Elements from a row to the next.
        stride: usize,
        /// Cells covered.
        n_kv: usize,
    },
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one layer, updated by whichever thread does the work.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }
        /// A reading of [`Counters`].
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }
        impl Counters {
            /// Read all.
            pub fn read(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Rows stored by steps of more than 64 tokens.
    appended_prefill,
    /// Rows stored by steps of up to 64 tokens.
    appended_decode,
    /// Rows coded by steps of more than 64 tokens.
    sealed_prefill,
    /// Rows coded by steps of up to 64 tokens.
    sealed_decode,
    /// Visible exact rows, summed over the query tokens of steps of up to 64 that attended to them.
    attended_exact,
    /// Visible coded rows, summed over the query tokens of steps of up to 64 that attended to them.
    attended_coded,
    /// Coded rows rebuilt: each once for a step of more than 64 tokens, or on request.
    reconstructed,
    /// Times the bases were fitted.
    fits,
    /// Coded rows moved by compaction.
    moved,
    /// Rows coded again in a coarser band.
    recoded,
    /// Nanoseconds of the first thread in storing.
    ns_encode,
    /// Nanoseconds of the first thread in attention.
    ns_attend,
    /// Nanoseconds of the first thread in rebuilding.
    ns_reconstruct,
}

/// See the module.
#[derive(Debug)]
pub struct Layer {
    pub(super) geometry: Arc<Geometry>,
    index: usize,
    pub(super) rope: Rope,
    scoring: Scoring,
    /// All heads' stored bases, when they come from a calibration.
    calibrated: Option<Vec<u8>>,
    /// Rows were stored in some arena.
    used: AtomicBool,
    /// The layer's first KV head, counted over all layers.
    first_head: usize,
    /// What studies found so far, the latest last. It is never more than time saved: who misses it looks again.
    studies: Mutex<Vec<Studied>>,
    /// What this layer has done.
    pub counters: Counters,
}

/// What the steps of a study have found.
#[derive(Debug)]
struct Studied {
    id: i32,
    /// Heads that were looked at, until all were.
    heads: Vec<Option<HeadSpectrum>>,
    /// Then all heads' bases as an arena has them.
    bases: Option<Arc<[u8]>>,
    /// And what was coded with them.
    coded: Vec<Option<Coded>>,
}

/// A head's tiles, coded ahead of the fit.
#[derive(Debug)]
struct Coded {
    /// What made them, as plans have it.
    changes: Vec<i32>,
    /// All up to the last one in use: a fit leaves no gaps.
    tiles: Vec<u8>,
}

#[derive(Default)]
struct Scratch {
    bases: (Basis, Basis),
    rows_k: Vec<f32>,
    rows_v: Vec<f32>,
    work: Vec<f32>,
    tile: TileWork,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The bytes of one KV head that storing may change, and its bases.
pub struct HeadMut<'a> {
    /// Record and permanent exact rows.
    pub exact: &'a mut [u8],
    /// Before the fit: further exact rows and queries. Empty after it.
    pub raw: &'a mut [u8],
    /// The bases, empty before the fit.
    pub bases: &'a [u8],
    /// Tiles, empty before the fit.
    pub tiles: &'a mut [u8],
}

/// What each head keeps before a fit: record and permanent exact rows, further exact rows and queries.
type Waiting<'a> = Vec<(&'a [u8], &'a [u8])>;

/// The rows and queries that a plan names for a fit, and where each stands.
struct Material {
    from: Vec<SealRow>,
    rows: Vec<fit::Place>,
    slots: Vec<usize>,
    queries: Vec<fit::Place>,
}

/// Write a head's bases as an arena has them.
fn store_bases(g: &LayerGeometry, (k, v): &(Basis, Basis), bytes: &mut [u8]) {
    let (bk, bv) = bytes.split_at_mut(LayerGeometry::basis_bytes_of(g.d_k));
    k.store(bk);
    v.store(bv);
}

impl Layer {
    /// Layer `index` of a geometry; keys are stored un-rotated until a rope is set.
    pub fn new(geometry: Arc<Geometry>, index: usize) -> Result<Self> {
        let Some(l) = geometry.layers.get(index) else {
            return argument(format!("layer {index} of {}", geometry.layers.len()));
        };
        let scoring = Scoring { scale: 1.0 / (l.d_k as f32).sqrt(), softcap: 0.0 };
        Ok(Layer {
            rope: Rope::identity(),
            scoring,
            calibrated: None,
            used: AtomicBool::new(false),
            first_head: geometry.layers[..index].iter().map(|l| l.n_head_kv).sum(),
            studies: Mutex::default(),
            counters: Counters::default(),
            geometry,
            index,
        })
    }

    /// Sizes of this layer.
    pub fn shape(&self) -> &LayerGeometry {
        &self.geometry.layers[self.index]
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
        if rope != self.rope {
            self.calibrated = None;
        }
        self.rope = rope;
        Ok(())
    }

    /// Take the bases from layer `model_layer` of a calibration instead of fitting them. The rope must have been set.
    pub fn set_calibration(&mut self, calibration: &Calibration, model_layer: usize) -> Result<()> {
        if !self.geometry.config.calibrated {
            return Err(Error::State("the cache was not configured for a calibration".into()));
        }
        let g = self.shape();
        let Some(Some(l)) = calibration.layers.get(model_layer) else {
            return Err(Error::Data(format!("the calibration has no layer {model_layer}")));
        };
        let s = &l.shape;
        if [s.n_head, s.n_head_kv, s.d_k, s.d_v].map(|x| x as usize) != [g.n_head, g.n_head_kv, g.d_k, g.d_v] {
            return Err(Error::Data(format!("layer {model_layer} of the calibration has other heads")));
        }
        if l.rope != self.rope.to_bytes() {
            return Err(Error::Data(format!("layer {model_layer} of the calibration has other RoPE settings")));
        }
        let mut bytes = vec![0; g.n_head_kv * g.basis_bytes()];
        let bases = l.spectrum.bases(g, self.geometry.band_ends());
        bytes.chunks_exact_mut(g.basis_bytes()).zip(bases).for_each(|(bytes, b)| store_bases(g, &b, bytes));
        self.calibrated = Some(bytes);
        Ok(())
    }

    /// The bases of a calibration; `None` when they are to be fitted.
    fn calibrated_bases(&self) -> Result<Option<&[u8]>> {
        match &self.calibrated {
            None if self.geometry.config.calibrated => Err(Error::State("no calibration was set for this layer".into())),
            bases => Ok(bases.as_deref()),
        }
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

    pub(super) fn check_rows(&self, plan: &Plan, rows: &[&Rows]) -> Result<()> {
        match rows.iter().find(|r| r.len() != plan.tokens().len()) {
            Some(r) => argument(format!("{} rows for a plan of {} tokens", r.len(), plan.tokens().len())),
            None => Ok(()),
        }
    }

    fn check_finite(&self, head: usize, k: &Rows, v: &Rows) -> Result<()> {
        let g = self.shape();
        for i in 0..k.len() {
            for (x, d, name) in [(k, g.d_k, "key"), (v, g.d_v, "value")] {
                if !x.is_finite(i, head, d) {
                    return Err(Error::NotFinite(format!("{name} of token {i} of the step, KV head {head}, in f16")));
                }
            }
        }
        Ok(())
    }

    /// Byte ranges of the heads in an arena, for a plan.
    pub fn ranges(&self, arena: &[u8], plan: &Plan) -> Result<Vec<arena::HeadRanges>> {
        arena::ranges(arena, self.shape(), &self.geometry.band_tiles, plan.fitted)
    }

    /// Store one KV head's part of a step that does not fit. `q` is only looked at before the fit, `projection` (as in
    /// [`Layer::append_fit`]) where [`Layer::wants_projection`].
    #[expect(clippy::too_many_arguments, reason = "a step, where it goes and what a fit looks at")]
    pub fn append_head(&self, head: usize, m: HeadMut, plan: &Plan, q: &Rows, k: &Rows, v: &Rows, projection: &[f32]) -> Result<()> {
        self.check_rows(plan, &[q, k, v])?;
        self.check_finite(head, k, v)?;
        if head == 0 {
            self.count_append(plan);
        }
        if plan.studies(self.first_head + head) {
            self.check_projection(projection, head..head + 1)?;
            let material = self.material(plan, true);
            let found = self.look_at(head, &material, (m.exact, m.raw), plan, Some((q, k, v)), projection)?;
            self.note(plan.study.id, head, found);
        }
        if plan.studies(self.geometry.n_heads() + self.first_head + head) {
            self.code_ahead(head, (m.exact, m.raw), plan)?;
        }
        self.store_head(head, m, plan, Some((q, k, v)))
    }

    /// Rows are about to be stored: the rope stays as it is.
    pub fn mark_used(&self) {
        self.used.store(true, Relaxed);
    }

    fn count_append(&self, plan: &Plan) {
        self.mark_used();
        // Below zero it is one that was given up.
        self.take_study(plan.study.id.wrapping_neg());
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

    /// Without `input`: what the plan does to stored rows only (new tokens leave dead rows).
    fn store_head(&self, head: usize, m: HeadMut, plan: &Plan, input: Option<(&Rows, &Rows, &Rows)>) -> Result<()> {
        let (g, slots, kernels) = (self.shape(), self.geometry.exact, simd::kernels());
        if plan.fitted {
            if plan.changes().next().is_some() {
                let rows = ExactRows::new(g, slots, m.exact, m.raw)?;
                let stored = input.map(|(_, k, v)| (k, v));
                let source = |s: Source, k: &mut [f32], v: &mut [f32]| self.fetch(head, s, &rows, stored, k, v);
                self.change_tiles(kernels, m.bases, m.tiles, plan.changes(), source)?;
            }
        } else if let (Some((q, _, _)), false) = (input, m.raw.is_empty()) {
            let kept = arena::queries_mut(g, m.raw)?;
            self.keep_queries(head, kept, plan, q);
        }
        if let Some((_, k, v)) = input {
            self.store_tokens(head, m.exact, m.raw, plan, k, v)?;
        }
        arena::set_epoch(m.exact, plan.epoch);
        Ok(())
    }

    /// Write the step's tokens that stay exact to their slots.
    fn store_tokens(&self, head: usize, exact: &mut [u8], raw: &mut [u8], plan: &Plan, k: &Rows, v: &Rows) -> Result<()> {
        let g = self.shape();
        for (token, (_, slot)) in plan.tokens().enumerate() {
            if let Some(slot) = slot {
                let row = arena::exact_row_mut(g, self.geometry.exact, exact, raw, slot)?;
                row[..g.d_k].convert_from_f32_slice(k.head(token, head, g.d_k));
                row[g.d_k..].convert_from_f32_slice(v.head(token, head, g.d_v));
            }
        }
        Ok(())
    }

    /// Write the queries that the plan records for the fit to their slots.
    fn keep_queries(&self, head: usize, kept: &mut [f16], plan: &Plan, q: &Rows) {
        let (g, n) = (self.shape(), self.shape().group() * self.shape().d_k);
        for (token, slot) in plan.records() {
            for (a, out) in kept[slot * n..(slot + 1) * n].chunks_exact_mut(g.d_k).enumerate() {
                out.convert_from_f32_slice(q.head(token, head * g.group() + a, g.d_k));
            }
        }
    }

    /// Key and value of a source as f32, rounded through f16 as a stored row is. Absent tokens give zeros.
    pub(super) fn fetch(&self, head: usize, s: Source, rows: &ExactRows, input: Option<(&Rows, &Rows)>, key: &mut [f32], value: &mut [f32]) {
        let g = self.shape();
        match (s, input) {
            (Source::Slot(slot), _) => {
                (simd::kernels().widen)(&rows.row(slot)[..g.d_k], 1.0, key);
                (simd::kernels().widen)(&rows.row(slot)[g.d_k..], 1.0, value);
            }
            (Source::Token(t), Some((k, v))) => {
                for (to, from) in [(key, k.head(t, head, g.d_k)), (value, v.head(t, head, g.d_v))] {
                    for (to, from) in to.chunks_mut(TILE).zip(from.chunks(TILE)) {
                        let half = &mut [f16::ZERO; TILE][..from.len()];
                        half.convert_from_f32_slice(from);
                        (simd::kernels().widen)(half, 1.0, to);
                    }
                }
            }
            (Source::Token(_), None) => {
                key.fill(0.0);
                value.fill(0.0);
            }
        }
    }

    /// Carry out changes to one head's tiles.
    fn change_tiles(
        &self,
        kernels: &Kernels,
        bases: &[u8],
        tiles: &mut [u8],
        changes: Changes,
        source: impl Fn(Source, &mut [f32], &mut [f32]),
    ) -> Result<()> {
        let g = self.shape();
        let (bk, bv) = bases.split_at(LayerGeometry::basis_bytes_of(g.d_k));
        let map = TileMap::of(self.geometry.band_tiles, g, bases);
        SCRATCH.with_borrow_mut(|s| {
            s.bases.0.load_encoder(bk, g.d_k)?;
            s.bases.1.load_encoder(bv, g.d_v)?;
            let mut turn = Turn::default();
            s.rows_k.resize(TILE * g.d_k, 0.0);
            s.rows_v.resize(TILE * g.d_v, 0.0);
            for change in changes {
                let (tile, rows) = match change {
                    Change::Move { from, to } => {
                        let codes = codec::take_row(&map, tiles, from);
                        codec::put_row(&map, tiles, to, &codes);
                        continue;
                    }
                    Change::Recode { from, to } => {
                        codec::recode_tile(kernels, (&s.bases.0, &s.bases.1), &map, tiles, (from, to), &mut s.tile);
                        continue;
                    }
                    Change::Seal { tile, rows } => (tile, rows),
                };
                let place = map.place(tile);
                let [(gk, ck), (gv, cv)] = codec::split_tile_mut(&mut tiles[place.bytes], place.k);
                let mut last = None;
                for ((row, k), v) in rows.zip(s.rows_k.chunks_exact_mut(g.d_k)).zip(s.rows_v.chunks_exact_mut(g.d_v)) {
                    source(row.source, k, v);
                    // Rows that nothing was done to since they were stored share their turn.
                    if last != Some(row.turn) {
                        self.rope.turn(i64::from(row.turn), &mut turn);
                        last = Some(row.turn);
                    }
                    self.rope.rotate(&turn, k);
                }
                codec::encode_tile(kernels, &s.bases.0, place.band, &s.rows_k[..TILE * g.d_k], gk, ck, &mut s.tile);
                codec::encode_tile(kernels, &s.bases.1, place.band, &s.rows_v[..TILE * g.d_v], gv, cv, &mut s.tile);
            }
            Ok(())
        })
    }

    /// Checks what some KV heads look at.
    fn check_projection(&self, projection: &[f32], heads: Range<usize>) -> Result<()> {
        let (g, n) = (self.shape(), self.shape().group() * self.shape().d_v);
        // No early end within a row: a loop that may stop is not made of vectors.
        let is_finite = |row: &[f32]| row[heads.start * n..heads.end * n].iter().fold(true, |finite, x| finite & x.is_finite());
        if !projection.len().is_multiple_of(g.n_head * g.d_v) || !projection.chunks_exact(g.n_head * g.d_v).all(is_finite) {
            return argument("the output projection is not finite or does not consist of whole rows");
        }
        Ok(())
    }

    /// Whether storing the heads `ith, ith + nth, ..` of this plan looks at the output projection; a fit is the first thread's.
    pub fn wants_projection(&self, plan: &Plan, ith: usize, nth: usize) -> bool {
        if plan.fit {
            let is_known = self.studies().iter().any(|s| s.id == plan.study.id && s.bases.is_some());
            return ith == 0 && self.calibrated.is_none() && !is_known;
        }
        (ith..self.shape().n_head_kv).step_by(nth).any(|head| plan.studies(self.first_head + head))
    }

    fn studies(&self) -> MutexGuard<'_, Vec<Studied>> {
        self.studies.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Note what a study found in a head. Who finds the last one makes the bases.
    fn note(&self, id: i32, head: usize, found: HeadSpectrum) {
        let n = self.shape().n_head_kv;
        let complete = {
            let mut studies = self.studies();
            let at = studies.iter().position(|s| s.id == id).unwrap_or_else(|| {
                // A stream has one study at a time: what is more was given up.
                if studies.len() >= self.geometry.config.n_streams as usize {
                    studies.remove(0);
                }
                studies.push(Studied { id, heads: vec![None; n], bases: None, coded: Vec::new() });
                studies.len() - 1
            });
            let heads = &mut studies[at].heads;
            heads[head] = Some(found);
            heads.iter().all(Option::is_some).then(|| heads.iter_mut().filter_map(Option::take).collect())
        };
        let Some(heads) = complete else { return };
        let bases = self.spend(heads);
        if let Some(study) = self.studies().iter_mut().find(|s| s.id == id) {
            (study.bases, study.coded) = (Some(bases), std::iter::repeat_with(|| None).take(n).collect());
        }
    }

    /// Code a head's rows as the plan expects of the fit. Without bases that is left to the fit.
    fn code_ahead(&self, head: usize, (exact, raw): (&[u8], &[u8]), plan: &Plan) -> Result<()> {
        let bases = self.studies().iter().find(|s| s.id == plan.study.id).and_then(|s| s.bases.clone());
        let Some(bases) = bases else { return Ok(()) };
        let source = ExactRows::new(self.shape(), self.geometry.exact, exact, raw)?;
        let tiles = self.code(head, &bases, None, plan.ahead(), |s, k, v| self.fetch(head, s, &source, None, k, v))?;
        if let Some(study) = self.studies().iter_mut().find(|s| s.id == plan.study.id) {
            study.coded[head] = Some(Coded { changes: plan.ahead().ints().to_vec(), tiles });
        }
        Ok(())
    }

    /// A head's tiles, up to the last one in use, after the changes of a fit. What was coded ahead is taken if the first changes are those
    /// that made it.
    fn code(
        &self,
        head: usize,
        bases: &[u8],
        ahead: Option<Coded>,
        changes: Changes,
        source: impl Fn(Source, &mut [f32], &mut [f32]),
    ) -> Result<Vec<u8>> {
        let g = self.shape();
        let bases = &bases[head * g.basis_bytes()..(head + 1) * g.basis_bytes()];
        let map = TileMap::of(self.geometry.band_tiles, g, bases);
        let known = ahead.and_then(|c| Some((c.tiles, changes.after(&c.changes)?)));
        let (mut tiles, rest) = known.unwrap_or((Vec::new(), changes));
        tiles.resize(changes.map(|c| map.place(c.last_tile()).bytes.end).max().unwrap_or(0), 0);
        if !rest.ints().is_empty() {
            self.change_tiles(simd::kernels(), bases, &mut tiles, rest, source)?;
        }
        Ok(tiles)
    }

    /// All heads' bases, as an arena has them.
    fn spend(&self, heads: Vec<HeadSpectrum>) -> Arc<[u8]> {
        let (g, ends) = (self.shape(), self.geometry.band_ends());
        let mut bytes = vec![0; g.n_head_kv * g.basis_bytes()];
        let bases = Spectrum::new(ends.to_vec(), heads).bases(g, ends);
        bytes.chunks_exact_mut(g.basis_bytes()).zip(bases).for_each(|(bytes, b)| store_bases(g, &b, bytes));
        bytes.into()
    }

    /// What a study found, which is over.
    fn take_study(&self, id: i32) -> Option<Studied> {
        let mut studies = self.studies();
        studies.iter().position(|s| s.id == id).map(|at| studies.remove(at))
    }

    /// Store a whole step that fits the bases first. Single-threaded; allocates memory for tiles, which then take the place of their rows.
    /// `projection` holds rows of the output projection, `n_head * d_v` each, or nothing for identity.
    pub fn append_fit(&self, arena: &mut [u8], plan: &Plan, q: &Rows, k: &Rows, v: &Rows, projection: &[f32]) -> Result<()> {
        self.check_rows(plan, &[q, k, v])?;
        for head in 0..self.shape().n_head_kv {
            self.check_finite(head, k, v)?;
        }
        self.check_projection(projection, 0..self.shape().n_head_kv)?;
        self.count_append(plan);
        self.fit_and_store(arena, plan, Some((q, k, v)), projection)
    }

    fn fit_and_store(&self, arena: &mut [u8], plan: &Plan, input: Option<(&Rows, &Rows, &Rows)>, projection: &[f32]) -> Result<()> {
        let (g, slots) = (self.shape(), self.geometry.exact);
        let before = arena::ranges(arena, g, &self.geometry.band_tiles, false)?;
        let calibrated = self.calibrated_bases()?;
        let mut study = self.take_study(plan.study.id);
        let mut coded = study.as_mut().map(|s| std::mem::take(&mut s.coded)).unwrap_or_default();
        coded.resize_with(g.n_head_kv, || None);
        let waiting: Waiting = before.iter().map(|r| (&arena[r.exact.clone()], &arena[r.raw.clone()])).collect();
        let fitted;
        let bases = match calibrated {
            Some(bases) => bases,
            None => {
                fitted = self.fit(study, &waiting, plan, input, projection)?;
                &fitted
            }
        };
        let stored = input.map(|(_, k, v)| (k, v));
        let tiles = coded.into_iter().zip(&waiting).enumerate().map(|(head, (coded, (exact, raw)))| {
            let source = ExactRows::new(g, slots, exact, raw)?;
            self.code(head, bases, coded, plan.changes(), |s, k, v| self.fetch(head, s, &source, stored, k, v))
        });
        let tiles = tiles.collect::<Result<Vec<_>>>()?;
        // Nothing has been written so far. Rows that stay exact leave the body, then bases and tiles take it.
        let (front, body) = arena.split_at_mut(g.body_offset());
        let mut row = Vec::new();
        for r in &before {
            let (record, raw) = (&mut front[r.exact.clone()], &body[r.raw.start - g.body_offset()..r.raw.end - g.body_offset()]);
            for (from, to) in plan.relocations() {
                row.clear();
                row.extend_from_slice(ExactRows::new(g, slots, record, raw)?.row(from));
                arena::exact_row_mut(g, slots, record, &mut [], to)?.copy_from_slice(&row);
            }
        }
        body[..bases.len()].copy_from_slice(bases);
        arena::write_header(arena);
        let after = arena::ranges(arena, g, &self.geometry.band_tiles, true)?;
        for (head, (r, tiles)) in after.into_iter().zip(tiles).enumerate() {
            arena[r.tiles][..tiles.len()].copy_from_slice(&tiles);
            let record = &mut arena[r.exact];
            if let Some((_, k, v)) = input {
                self.store_tokens(head, record, &mut [], plan, k, v)?;
            }
            arena::set_epoch(record, plan.epoch);
        }
        Ok(())
    }

    /// Bases of all heads, as an arena has them. Heads that no study has looked at are looked at now.
    fn fit(
        &self,
        study: Option<Studied>,
        waiting: &Waiting,
        plan: &Plan,
        input: Option<(&Rows, &Rows, &Rows)>,
        projection: &[f32],
    ) -> Result<Arc<[u8]>> {
        let known = match study {
            Some(Studied { bases: Some(bases), .. }) => return Ok(bases),
            Some(Studied { heads, .. }) => heads,
            None => vec![None; waiting.len()],
        };
        let material = self.material(plan, input.is_some());
        let heads = known.into_iter().zip(waiting).enumerate().map(|(head, (known, (exact, raw)))| match known {
            Some(known) => Ok(known),
            None => self.look_at(head, &material, (exact, raw), plan, input, projection),
        });
        Ok(self.spend(heads.collect::<Result<Vec<_>>>()?))
    }

    /// Without input, the step's own rows and queries are missing.
    fn material(&self, plan: &Plan, has_input: bool) -> Material {
        let place = |pos: i32, seq: i32| fit::Place { pos, seq };
        let recorded: Vec<usize> = plan.records().map(|(_, slot)| slot).collect();
        let rows = plan.fit_rows().filter(|(r, ..)| has_input || matches!(r.source, Source::Slot(_)));
        let (from, rows) = rows.map(|(r, pos, seq)| (r, place(pos, seq))).unzip();
        let queries = plan.fit_queries().filter(|(slot, ..)| has_input || !recorded.contains(slot));
        let (slots, queries) = queries.map(|(slot, pos, seq)| (slot, place(pos, seq))).unzip();
        Material { from, rows, slots, queries }
    }

    /// What a head's rows and queries say; `exact` and `raw` are what it has stored.
    fn look_at(
        &self,
        head: usize,
        material: &Material,
        (exact, raw): (&[u8], &[u8]),
        plan: &Plan,
        input: Option<(&Rows, &Rows, &Rows)>,
        projection: &[f32],
    ) -> Result<HeadSpectrum> {
        let g = self.shape();
        let source = ExactRows::new(g, self.geometry.exact, exact, raw)?;
        let n = material.from.len();
        let mut own = HeadRows { k: vec![0.0; n * g.d_k], k_framed: Vec::new(), v: vec![0.0; n * g.d_v], q: Vec::new() };
        for ((r, k), v) in material.from.iter().zip(own.k.chunks_exact_mut(g.d_k)).zip(own.v.chunks_exact_mut(g.d_v)) {
            self.fetch(head, r.source, &source, input.map(|(_, k, v)| (k, v)), k, v);
        }
        own.k_framed.clone_from(&own.k);
        let (mut turn, mut last) = (Turn::default(), None);
        for (r, key) in material.from.iter().zip(own.k_framed.chunks_exact_mut(g.d_k)) {
            if last != Some(r.turn) {
                self.rope.turn(i64::from(r.turn), &mut turn);
                last = Some(r.turn);
            }
            self.rope.rotate(&turn, key);
        }
        let n = g.group() * g.d_k;
        let mut kept = arena::queries(g, raw)?.to_vec();
        if let Some((q, ..)) = input {
            self.keep_queries(head, &mut kept, plan, q);
        }
        own.q.resize(material.slots.len() * n, 0.0);
        for (slot, q) in material.slots.iter().zip(own.q.chunks_exact_mut(n)) {
            (simd::kernels().widen)(&kept[slot * n..(slot + 1) * n], 1.0, q);
        }
        let sample = fit::Sample {
            rows: &material.rows,
            queries: &material.queries,
            projection,
            scale: self.scoring.scale,
            softcap: self.scoring.softcap,
            window: self.geometry.config.window as i32,
            n_cells: i64::from(self.geometry.config.n_cells),
            edges: self.geometry.band_ends().to_vec(),
        };
        fit::analyse(simd::kernels(), g, &self.rope, &sample, head, &own)
    }

    /// After a graph that stopped part-way: do what the plan does to rows already stored, unless this arena has done it.
    /// New tokens are gone; tile rows meant for them hold nothing anyone will look at. A fit looks at the rows stored before the
    /// step; with too few of them nothing is done, and the table forgets its rows. Single-threaded.
    pub fn replay(&self, arena: &mut [u8], plan: &Plan) -> Result<()> {
        let g = self.shape();
        let heads = self.ranges(arena, plan)?;
        if plan.fit {
            let has_run = arena::epoch(&arena[g.exact_offset(0)..]) == plan.epoch;
            let lost = plan::replay_is_lost(&self.geometry, plan.fit_rows().map(|(r, ..)| r.source));
            return if has_run || lost { Ok(()) } else { self.fit_and_store(arena, plan, None, &[]) };
        }
        for (head, r) in heads.into_iter().enumerate() {
            if arena::epoch(&arena[r.exact.clone()]) == plan.epoch || !plan.fitted {
                continue;
            }
            let bases = arena[r.bases.clone()].to_vec();
            let (front, tiles) = arena.split_at_mut(r.tiles.start.max(g.body_offset()));
            let m = HeadMut { exact: &mut front[r.exact], raw: &mut [], bases: &bases, tiles: &mut tiles[..r.tiles.len()] };
            self.store_head(head, m, plan, None)?;
        }
        Ok(())
    }

    /// Dense roped f16 rows of the cells in `cells`: keys to `k_out[cell][head][d_k]`, values to `v_out[cell][head][d_v]`,
    /// both starting at the first of these cells. Empty cells give zeros.
    #[expect(clippy::too_many_arguments, reason = "two inputs and two outputs of one step")]
    pub fn reconstruct(
        &self,
        arena: &[u8],
        plan: &Plan,
        k: &Rows,
        v: &Rows,
        cells: Range<usize>,
        k_out: &mut [f16],
        v_out: &mut [f16],
    ) -> Result<()> {
        let (g, kernels) = (self.shape(), simd::kernels());
        self.check_rows(plan, &[k, v])?;
        let heads = self.ranges(arena, plan)?;
        let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
        if k_out.len() < cells.len() * nk || v_out.len() < cells.len() * nv {
            return Err(Error::Buffer { need: cells.len() * nk.max(nv), have: k_out.len().min(v_out.len()) });
        }
        k_out.fill(f16::ZERO);
        v_out.fill(f16::ZERO);
        let index = |cell: usize| cells.contains(&cell).then(|| cell - cells.start);
        let mut turn = Turn::default();
        for (token, (cell, _)) in plan.tokens().enumerate() {
            let Some(i) = index(cell) else { continue };
            for head in 0..g.n_head_kv {
                k_out[i * nk + head * g.d_k..][..g.d_k].convert_from_f32_slice(k.head(token, head, g.d_k));
                v_out[i * nv + head * g.d_v..][..g.d_v].convert_from_f32_slice(v.head(token, head, g.d_v));
            }
        }
        let mut coded = 0;
        for (head, r) in heads.iter().enumerate() {
            let rows = ExactRows::new(g, self.geometry.exact, &arena[r.exact.clone()], if plan.fitted { &[] } else { &arena[r.raw.clone()] })?;
            for (slot, cell, t) in plan.exact() {
                let Some(i) = index(cell) else { continue };
                let row = rows.row(slot);
                let out = &mut k_out[i * nk + head * g.d_k..][..g.d_k];
                out.copy_from_slice(&row[..g.d_k]);
                if t != 0 && !self.rope.is_identity() {
                    let mut key: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
                    self.rope.turn(i64::from(t), &mut turn);
                    self.rope.rotate(&turn, &mut key);
                    out.convert_from_f32_slice(&key);
                }
                v_out[i * nv + head * g.d_v..][..g.d_v].copy_from_slice(&row[g.d_k..]);
            }
            if !plan.fitted || plan.tiles().len() == 0 {
                continue;
            }
            SCRATCH.with_borrow_mut(|s| -> Result<()> {
                let (bk, bv) = arena[r.bases.clone()].split_at(LayerGeometry::basis_bytes_of(g.d_k));
                s.bases.0.load(bk, g.d_k, false)?;
                s.bases.1.load(bv, g.d_v, false)?;
                let map = TileMap::of(self.geometry.band_tiles, g, &arena[r.bases.clone()]);
                s.rows_k.resize(TILE * g.d_k, 0.0);
                s.rows_v.resize(TILE * g.d_v, 0.0);
                for t in plan.tiles() {
                    let wanted = (0..TILE).filter(|row| t.cell(*row).and_then(index).is_some()).fold(0u64, |m, row| m | 1 << row);
                    if wanted == 0 {
                        continue;
                    }
                    let place = map.place(t.tile);
                    let [(gk, ck), (gv, cv)] = codec::split_tile(&arena[r.tiles.clone()][place.bytes], place.k);
                    codec::decode_rows(kernels, &s.bases.0, place.band, gk, ck, wanted, &mut s.rows_k, &mut s.work);
                    codec::decode_rows(kernels, &s.bases.1, place.band, gv, cv, wanted, &mut s.rows_v, &mut s.work);
                    let mut last = None;
                    for row in (0..TILE).filter(|row| wanted >> row & 1 == 1) {
                        let i = index(t.cell(row).expect("invariant: wanted rows have cells")).expect("invariant: wanted rows are in range");
                        if last != Some(t.turn(row)) {
                            self.rope.turn(i64::from(t.turn(row)), &mut turn);
                            last = Some(t.turn(row));
                        }
                        let key = &mut s.rows_k[row * g.d_k..][..g.d_k];
                        self.rope.rotate(&turn, key);
                        k_out[i * nk + head * g.d_k..][..g.d_k].convert_from_f32_slice(key);
                        v_out[i * nv + head * g.d_v..][..g.d_v].convert_from_f32_slice(&s.rows_v[row * g.d_v..][..g.d_v]);
                        coded += u64::from(head == 0);
                    }
                }
                Ok(())
            })?;
        }
        self.counters.reconstructed.fetch_add(coded, Relaxed);
        Ok(())
    }
}
