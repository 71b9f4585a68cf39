//! The sample of a fit: the rows and queries of one KV head that a plan names, fetched from wherever they are.
//!
//! Must not know what is found in them, nor when a fit is due.

use super::arena::{self, AllBases, Bytes, ExactRows, Pieces};
use super::input::Step;
use super::layer::Layer;
use super::plan::{Plan, SealRow, Source};
use crate::codec::fit::{HeadRows, Place};
use crate::codec::{self, TileWork};
use crate::error::{argument, Result};
use crate::layout::geometry::HeadRanges;
use crate::layout::{FINE_ROWS, NO_ROW, QUERY_SLOTS, TILE};
use crate::rope::Turn;
use crate::simd;

impl Layer {
    /// Keys, as they are now, and values; which of them draw attention is known of coded ones.
    pub(super) fn fetch_sample(
        &self,
        head: usize,
        bytes: &impl Bytes,
        r: &HeadRanges,
        plan: &Plan,
        from: &[(SealRow, i32, i32)],
        step: Option<&Step>,
    ) -> Result<HeadRows> {
        let (g, exact) = (self.shape(), ExactRows::new(self.shape(), bytes.get(r.exact.clone()))?);
        let mut coded = CodedRows::new(self, head, bytes, r, plan)?;
        let mut own = HeadRows { k: vec![0.0; from.len() * g.d_k], v: vec![0.0; from.len() * g.d_v], ..HeadRows::default() };
        let (mut turn, mut last) = (Turn::default(), None);
        let rows = own.k.chunks_exact_mut(g.d_k).zip(own.v.chunks_exact_mut(g.d_v));
        for (i, ((row, ..), (key, value))) in from.iter().zip(rows).enumerate() {
            let Source::Coded(at) = row.source else {
                self.fetch(head, row.source, &exact, step.map(|s| (&s.k, &s.v)), key, value);
                continue;
            };
            coded.load(at / TILE, bytes);
            key.copy_from_slice(&coded.k[at % TILE * g.d_k..][..g.d_k]);
            value.copy_from_slice(&coded.v[at % TILE * g.d_v..][..g.d_v]);
            if last.replace(row.turn) != Some(row.turn) {
                self.rope.turn(i64::from(row.turn), &mut turn);
            }
            self.rope.rotate(&turn, key);
            if coded.fine.iter().any(|fine| usize::from(*fine) == at % TILE) {
                own.fine.push(i);
            }
        }
        Ok(own)
    }

    /// The queries that were kept, those of the step among them: where they stand, and the squared norms of the residual stream there.
    pub(super) fn fetch_queries(
        &self,
        head: usize,
        bytes: &impl Bytes,
        r: &HeadRanges,
        plan: &Plan,
        step: Option<&Step>,
        q: &mut Vec<f32>,
    ) -> Result<(Vec<Place>, Vec<f32>)> {
        let n = self.shape().group() * self.shape().d_k;
        let (kept, norms) = arena::queries(bytes.get(r.queries.clone()))?;
        let (mut kept, mut norms) = (kept.to_vec(), norms.to_vec());
        let recorded: Vec<(usize, usize)> = plan.records().collect();
        if let Some(step) = step {
            self.keep_queries(head, (&mut kept, QUERY_SLOTS), plan.records(), step);
            recorded.iter().for_each(|(token, slot)| norms[*slot] = step.residual_power(*token));
        }
        let (mut places, mut residual) = (Vec::new(), Vec::new());
        for (slot, pos, seq) in plan.fit_queries() {
            if step.is_none() && recorded.iter().any(|(_, s)| *s == slot) {
                continue;
            }
            places.push(Place { pos, seq });
            residual.push(norms[slot]);
            let at = q.len();
            q.resize(at + n, 0.0);
            arena::query(&kept, (QUERY_SLOTS, self.shape().group()), slot, &mut q[at..]);
        }
        Ok((places, residual))
    }

    /// Checks the columns that belong to a KV head.
    pub(super) fn check_projection(&self, projection: &[f32], head: usize) -> Result<()> {
        let (g, n) = (self.shape(), self.shape().group() * self.shape().d_v);
        // No early end within a row: a loop that may stop is not made of vectors.
        let is_finite = |row: &[f32]| row[head * n..(head + 1) * n].iter().fold(true, |finite, x| finite & x.is_finite());
        if !projection.len().is_multiple_of(g.n_head * g.d_v) || !projection.chunks_exact(g.n_head * g.d_v).all(is_finite) {
            return argument("the output projection is not finite or does not consist of whole rows");
        }
        Ok(())
    }
}

/// Rows of a head's tiles, decoded a tile at a time.
struct CodedRows {
    pieces: Pieces,
    bases: AllBases,
    /// Which tile it is.
    tile: Option<usize>,
    k: Vec<f32>,
    v: Vec<f32>,
    fine: [u8; FINE_ROWS],
    work: TileWork,
}

impl CodedRows {
    fn new(layer: &Layer, head: usize, bytes: &impl Bytes, r: &HeadRanges, plan: &Plan) -> Result<Self> {
        let g = layer.shape();
        let (there, mut bases) = ((plan.fitted, plan.former), AllBases::default());
        bases.load(&layer.geometry, g, bytes, r, there, false)?;
        Ok(CodedRows {
            pieces: Pieces::new(&layer.geometry, layer.index, head, bytes, r, there)?,
            bases,
            tile: None,
            k: vec![0.0; TILE * g.d_k],
            v: vec![0.0; TILE * g.d_v],
            fine: [NO_ROW; FINE_ROWS],
            work: TileWork::default(),
        })
    }

    fn load(&mut self, tile: usize, bytes: &impl Bytes) {
        if self.tile.replace(tile) == Some(tile) {
            return;
        }
        let (kind, place) = self.pieces.place(tile);
        let (form, piece) = (self.pieces.form(kind), bytes.get(place));
        codec::decode_tile(simd::kernels(), self.bases.of(kind), form, piece, u64::MAX, &mut self.k, &mut self.v, &mut self.work);
        self.fine = form.fine_rows(piece);
    }
}
