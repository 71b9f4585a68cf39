//! Storing one KV head's part of a step, as the plan says: tiles are filled, moved and coded again, then new rows go to their slots.
//!
//! Must not know why a plan does what it does.

use super::arena::{self, AllBases, Bytes, BytesMut, ExactRows, Pieces};
use super::input::{Rows, Step};
use super::layer::Layer;
use super::plan::{Change, FillingView, Plan, Source};
use crate::codec::{self, TileWork};
use crate::error::Result;
use crate::layout::geometry::HeadRanges;
use crate::layout::{FINE_ROWS, QUERY_SLOTS, RECENT_QUERIES, TILE};
use crate::rope::Turn;
use crate::simd::{self, MatMut, MatRef};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;

#[derive(Default)]
struct Scratch {
    bases: AllBases,
    rows_k: Vec<f32>,
    rows_v: Vec<f32>,
    /// A piece of a tile that is coded again.
    piece: Vec<u8>,
    tile: TileWork,
    turn: Turn,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What changes to a head's tiles are made with.
struct Work<'a, 'p> {
    head: usize,
    r: HeadRanges,
    plan: &'a Plan<'p>,
    step: Option<&'a Step<'a>>,
    pieces: Pieces,
}

impl Layer {
    /// Without a step: what the plan does to stored rows only (new tokens leave dead rows).
    pub(super) fn store(&self, head: usize, bytes: &mut impl BytesMut, plan: &Plan, step: Option<&Step>) -> Result<()> {
        let r = self.geometry.head(self.index, head);
        if plan.changes().next().is_some() {
            let pieces = Pieces::new(&self.geometry, self.index, head, bytes, &r, plan.bases_to_store())?;
            self.change_tiles(&Work { head, r: r.clone(), plan, step, pieces }, bytes)?;
        }
        if let Some(step) = step {
            if plan.fitted && !plan.fit && plan.recents().len() > 0 {
                self.watch(head, bytes, plan, step)?;
            }
            self.store_tokens(head, bytes.get_mut(r.exact), plan, step)?;
            self.keep_queries(head, (bytes.get_mut(r.recent), RECENT_QUERIES), plan.recents(), step);
            if plan.records().len() > 0 {
                let (queries, norms) = arena::queries_mut(bytes.get_mut(r.queries))?;
                self.keep_queries(head, (queries, QUERY_SLOTS), plan.records(), step);
                plan.records().for_each(|(token, slot)| norms[slot] = step.residual_power(token));
            }
        }
        arena::set_epoch(bytes.get_mut(r.record), plan.epoch);
        Ok(())
    }

    /// Write the step's tokens that stay exact to their slots.
    fn store_tokens(&self, head: usize, exact: &mut [u8], plan: &Plan, step: &Step) -> Result<()> {
        let g = self.shape();
        for (token, (_, slot)) in plan.tokens().enumerate() {
            if let Some(slot) = slot {
                let row = arena::exact_row_mut(g, exact, slot)?;
                row[..g.d_k].convert_from_f32_slice(step.k.head(token, head, g.d_k));
                row[g.d_k..].convert_from_f32_slice(step.v.head(token, head, g.d_v));
            }
        }
        Ok(())
    }

    /// Write the queries of some tokens to their slots, of which there are so many.
    pub(super) fn keep_queries(&self, head: usize, kept: (&mut [u8], usize), which: impl Iterator<Item = (usize, usize)>, step: &Step) {
        let (g, (kept, slots)) = (self.shape(), kept);
        let mut query = Vec::with_capacity(g.group() * g.d_k);
        for (token, slot) in which {
            query.clear();
            (0..g.group()).for_each(|a| query.extend_from_slice(step.q.head(token, head * g.group() + a, g.d_k)));
            arena::put_query(kept, (slots, g.group()), slot, &query);
        }
    }

    /// Key and value of a source as f32, rounded through f16 as a stored row is. Absent tokens give zeros.
    pub(super) fn fetch(&self, head: usize, s: Source, rows: &ExactRows, own: Option<(&Rows, &Rows)>, key: &mut [f32], value: &mut [f32]) {
        let g = self.shape();
        match (s, own) {
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
            _ => {
                key.fill(0.0);
                value.fill(0.0);
            }
        }
    }

    /// Carry out the changes of a plan to one head's tiles.
    fn change_tiles(&self, w: &Work, bytes: &mut impl BytesMut) -> Result<()> {
        let g = self.shape();
        SCRATCH.with_borrow_mut(|s| {
            self.set_plain(w, bytes, s)?;
            s.bases.load(&self.geometry, g, bytes, &w.r, w.plan.bases_to_store(), true)?;
            for change in w.plan.changes() {
                match change {
                    Change::Move { from, to } => self.move_row(w, bytes, from, to),
                    Change::Recode { from, to } => self.recode(w, bytes, from, to, s),
                    Change::Seal { tile, filling } => self.seal(w, bytes, tile, filling, s)?,
                }
            }
            Ok(())
        })
    }

    /// What waiting rows are coded relative to. The first tile of them decides that, so that no channel drowns another; one that hardly moves
    /// there may do so later.
    fn set_plain(&self, w: &Work, bytes: &mut impl BytesMut, s: &mut Scratch) -> Result<()> {
        const LEAST: f32 = 0.1;
        let (g, first) = (self.shape(), self.geometry.tiles);
        let fills = |c: &Change<FillingView>| matches!(c, Change::Seal { tile, .. } if *tile >= first);
        if w.plan.changes().any(|c| fills(&c)) && w.plan.tiles().all(|t| t.tile < first) {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for change in w.plan.changes() {
                let Change::Seal { filling, .. } = change else { continue };
                self.fetch_filling(w, bytes, filling, s, None)?;
                keys.extend_from_slice(&s.rows_k);
                values.extend_from_slice(&s.rows_v);
            }
            let (mean, mut scale_k) = channels(&keys, g.d_k);
            let (mean_v, deviation_v) = channels(&values, g.d_v);
            let mut scale_v: Vec<f32> = mean_v.iter().zip(deviation_v).map(|(m, d)| m.hypot(d)).collect();
            let size = |mean: &[f32], deviation: &[f32]| mean.iter().zip(deviation).map(|(m, d)| m.hypot(*d)).collect::<Vec<f32>>();
            let sizes = [size(&mean, &scale_k), scale_v.clone()];
            for (scale, mut sizes) in [&mut scale_k, &mut scale_v].into_iter().zip(sizes) {
                sizes.sort_by(f32::total_cmp);
                let least = (LEAST * sizes[sizes.len() / 2]).max(1e-6);
                scale.iter_mut().for_each(|x| *x = x.max(least));
            }
            arena::set_plain(bytes.get_mut(w.r.plain.clone()), &mean, &scale_k, &scale_v);
        }
        Ok(())
    }

    /// A tile's rows in its frame; `roped` gets the keys as they were stored.
    fn fetch_filling(&self, w: &Work, bytes: &impl Bytes, filling: FillingView, s: &mut Scratch, roped: Option<&mut Vec<f32>>) -> Result<()> {
        let g = self.shape();
        let rows = ExactRows::new(g, bytes.get(w.r.exact.clone()))?;
        s.rows_k.resize(TILE * g.d_k, 0.0);
        s.rows_v.resize(TILE * g.d_v, 0.0);
        for ((row, k), v) in filling.rows().zip(s.rows_k.chunks_exact_mut(g.d_k)).zip(s.rows_v.chunks_exact_mut(g.d_v)) {
            self.fetch(w.head, row.source, &rows, w.step.map(|s| (&s.k, &s.v)), k, v);
        }
        if let Some(roped) = roped {
            roped.clone_from(&s.rows_k);
        }
        let mut last = None;
        for (row, k) in filling.rows().zip(s.rows_k.chunks_exact_mut(g.d_k)) {
            // Rows that nothing was done to since they were stored share their turn.
            if last != Some(row.turn) {
                self.rope.turn(i64::from(row.turn), &mut s.turn);
                last = Some(row.turn);
            }
            self.rope.rotate(&s.turn, k);
        }
        Ok(())
    }

    fn seal(&self, w: &Work, bytes: &mut impl BytesMut, tile: usize, filling: FillingView, s: &mut Scratch) -> Result<()> {
        let mut roped = Vec::new();
        self.fetch_filling(w, bytes, filling, s, Some(&mut roped))?;
        let fine = self.fine_rows(w, bytes, filling, &roped)?;
        let (kind, place) = w.pieces.place(tile);
        let (form, tile) = (w.pieces.form(kind), bytes.get_mut(place));
        codec::encode_tile(simd::kernels(), s.bases.of(kind), form, &s.rows_k, &s.rows_v, &fine, tile, &mut s.tile);
        Ok(())
    }

    /// The rows of a tile that draw most attention, as far as recent queries tell: `sum p^2` over them, with softmax among the tile's rows.
    fn fine_rows(&self, w: &Work, bytes: &impl Bytes, filling: FillingView, keys: &[f32]) -> Result<Vec<u8>> {
        let (g, kernels) = (self.shape(), simd::kernels());
        let (d, n) = (g.d_k, g.group() * g.d_k);
        let recent = bytes.get(w.r.recent.clone());
        let (mut mass, mut seen) = ([0.0f32; TILE], false);
        let (mut q, mut scores) = (vec![0.0; n], vec![0.0; g.group() * TILE]);
        for witness in filling.witnesses() {
            match (witness, w.step) {
                (Source::Slot(slot), _) => arena::query(recent, (RECENT_QUERIES, g.group()), slot, &mut q),
                (Source::Token(t), Some(step)) => {
                    q.chunks_exact_mut(d).enumerate().for_each(|(a, q)| q.copy_from_slice(step.q.head(t, w.head * g.group() + a, d)));
                }
                _ => continue,
            }
            seen = true;
            (kernels.dots)(MatRef::new(&q, d), MatRef::new(keys, d), MatMut::new(&mut scores, TILE), g.group(), d, TILE);
            for scores in scores.chunks_exact_mut(TILE) {
                scores.iter_mut().for_each(|s| *s *= self.scoring.scale);
                self.scoring.cap(scores);
                let sum = (kernels.exp_sum)(scores, (kernels.largest)(scores));
                mass.iter_mut().zip(&*scores).for_each(|(m, p)| *m += (p / sum) * (p / sum));
            }
        }
        if !seen {
            return Ok(Vec::new());
        }
        let mut order: Vec<u8> = (0..TILE as u8).collect();
        order.sort_by(|a, b| mass[usize::from(*b)].total_cmp(&mass[usize::from(*a)]));
        order.truncate(FINE_ROWS);
        Ok(order)
    }

    fn move_row(&self, w: &Work, bytes: &mut impl BytesMut, from: usize, to: usize) {
        let (kind, source) = w.pieces.place(from / TILE);
        let form = w.pieces.form(kind);
        let taken = form.take_row(bytes.get(source), from % TILE);
        form.put_row(bytes.get_mut(w.pieces.place(to / TILE).1), to % TILE, &taken);
    }

    fn recode(&self, w: &Work, bytes: &mut impl BytesMut, from: usize, to: usize, s: &mut Scratch) {
        let ((from_kind, source), (to_kind, target)) = (w.pieces.place(from), w.pieces.place(to));
        s.piece.clear();
        s.piece.extend_from_slice(bytes.get(source));
        let from = (s.bases.of(from_kind), w.pieces.form(from_kind), &s.piece[..]);
        let to = (s.bases.of(to_kind), w.pieces.form(to_kind), bytes.get_mut(target));
        codec::recode_tile(simd::kernels(), from, to, &mut s.tile);
    }
}

/// Mean and deviation of each channel of some rows.
fn channels(rows: &[f32], d: usize) -> (Vec<f32>, Vec<f32>) {
    let n = (rows.len() / d).max(1) as f32;
    let (mut mean, mut power) = (vec![0.0f32; d], vec![0.0f32; d]);
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / n);
    }
    for row in rows.chunks_exact(d) {
        power.iter_mut().zip(row).zip(&mean).for_each(|((p, x), m)| *p += (x - m) * (x - m) / n);
    }
    power.iter_mut().for_each(|p| *p = p.sqrt());
    (mean, power)
}
