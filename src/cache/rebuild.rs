//! Rows as dense roped f16: for plain users, saved states of other tools, and tests. Attention never comes here.
//!
//! Must not know what becomes of the rows.

use super::arena::AllBases;
use super::head::Head;
use super::input::Rows;
use super::layer::Layer;
use super::plan::{Plan, TileView};
use crate::codec::{self, TileWork};
use crate::error::{Error, Result};
use crate::layout::TILE;
use crate::rope::Turn;
use crate::simd;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Where rows go: those of some cells, all heads of a cell together.
struct Out<'a> {
    cells: Range<usize>,
    k: &'a mut [f16],
    v: &'a mut [f16],
    heads: usize,
}

impl Out<'_> {
    fn index(&self, cell: usize) -> Option<usize> {
        self.cells.contains(&cell).then(|| cell - self.cells.start)
    }
    fn row(&mut self, i: usize, head: usize, d_k: usize, d_v: usize) -> (&mut [f16], &mut [f16]) {
        let at = i * self.heads + head;
        (&mut self.k[at * d_k..(at + 1) * d_k], &mut self.v[at * d_v..(at + 1) * d_v])
    }
}

impl Layer {
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
        let g = self.shape();
        self.check_rows(plan, &[k, v])?;
        let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
        if k_out.len() < cells.len() * nk || v_out.len() < cells.len() * nv {
            return Err(Error::Buffer { need: cells.len() * nk.max(nv), have: k_out.len().min(v_out.len()) });
        }
        k_out.fill(f16::ZERO);
        v_out.fill(f16::ZERO);
        let mut out = Out { cells, k: k_out, v: v_out, heads: g.n_head_kv };
        for (token, (cell, _)) in plan.tokens().enumerate() {
            let Some(i) = out.index(cell) else { continue };
            for head in 0..g.n_head_kv {
                let (to_k, to_v) = out.row(i, head, g.d_k, g.d_v);
                to_k.convert_from_f32_slice(k.head(token, head, g.d_k));
                to_v.convert_from_f32_slice(v.head(token, head, g.d_v));
            }
        }
        let mut coded = 0;
        for index in 0..g.n_head_kv {
            let head = Head::new(self, index, arena, plan)?;
            self.rebuild_exact(&head, plan, &mut out);
            let n = self.rebuild_tiles(&head, arena, plan, &mut out)?;
            coded += if index == 0 { n } else { 0 };
        }
        self.counters.reconstructed.fetch_add(coded, Relaxed);
        Ok(())
    }

    fn rebuild_exact(&self, head: &Head, plan: &Plan, out: &mut Out) {
        let (g, mut turn) = (self.shape(), Turn::default());
        for (slot, cell, t) in plan.exact() {
            let Some(i) = out.index(cell) else { continue };
            let (row, (k, v)) = (head.stored_row(slot), out.row(i, head.index, g.d_k, g.d_v));
            k.copy_from_slice(&row[..g.d_k]);
            if t != 0 && !self.rope.is_identity() {
                let mut key: Vec<f32> = k.iter().map(|x| x.to_f32()).collect();
                self.rope.turn(i64::from(t), &mut turn);
                self.rope.rotate(&turn, &mut key);
                k.convert_from_f32_slice(&key);
            }
            v.copy_from_slice(&row[g.d_k..]);
        }
    }

    /// Gives how many rows there were.
    fn rebuild_tiles(&self, head: &Head, arena: &[u8], plan: &Plan, out: &mut Out) -> Result<u64> {
        let (g, mut bases): (_, AllBases) = (self.shape(), AllBases::default());
        head.read_bases(plan, &mut bases)?;
        let (mut keys, mut values, mut work) = (vec![0.0; TILE * g.d_k], vec![0.0; TILE * g.d_v], TileWork::default());
        let mut coded = 0;
        for t in plan.tiles() {
            let wanted = (0..TILE).filter(|row| t.cell(*row).and_then(|c| out.index(c)).is_some()).fold(0u64, |m, row| m | 1 << row);
            if wanted == 0 {
                continue;
            }
            let (kind, place) = head.piece(&t);
            codec::decode_tile(simd::kernels(), bases.of(kind), head.form(kind), &arena[place], wanted, &mut keys, &mut values, &mut work);
            self.put_rows(head.index, &t, wanted, (&mut keys, &values), out);
            coded += u64::from(wanted.count_ones());
        }
        Ok(coded)
    }

    /// Turn rows of a tile to where they are now, and write them.
    fn put_rows(&self, head: usize, t: &TileView, wanted: u64, (keys, values): (&mut [f32], &[f32]), out: &mut Out) {
        let (g, mut turn, mut last) = (self.shape(), Turn::default(), None);
        for row in (0..TILE).filter(|row| wanted >> row & 1 == 1) {
            let Some(i) = t.cell(row).and_then(|c| out.index(c)) else { continue };
            if last != Some(t.turn(row)) {
                self.rope.turn(i64::from(t.turn(row)), &mut turn);
                last = Some(t.turn(row));
            }
            let key = &mut keys[row * g.d_k..][..g.d_k];
            self.rope.rotate(&turn, key);
            let (k, v) = out.row(i, head, g.d_k, g.d_v);
            k.convert_from_f32_slice(key);
            v.convert_from_f32_slice(&values[row * g.d_v..][..g.d_v]);
        }
    }
}
