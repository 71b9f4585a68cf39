//! Attention of a step of any length, as the plan says: rows are rebuilt a tile at a time, and nothing of a layer's rows is kept.
//!
//! Work is cut into pieces of one KV head and [`TOKENS`] query tokens. A result depends on its own piece only, so pieces may be shared out in any way;
//! those of a head that are computed together share the rebuilding of its tiles. Must not know how scores are computed, nor about threads.

use super::arena::{self, ExactRows, Pieces};
use super::attend::{Call, Loaded, Seen};
use super::geometry::HeadRanges;
use super::input::Mask;
use super::layer::Layer;
use super::plan::{Plan, Source, TileView};
use crate::attention::prefill::{Prefill, Rebuilder, RowBlock, STEP};
use crate::attention::{Context, Turns, Visible};
use crate::config::TILE;
use crate::error::{argument, Error, Result};
use crate::rope::Turn;
use crate::simd;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Query tokens of a piece.
const TOKENS: usize = 64;
/// Floats that the queries of pieces computed together may take, and their output as well: a core's second cache holds both.
const QUERY_FLOATS: usize = 1 << 18;

/// Up to 64 rows: some of those that are listed one by one, or a tile.
enum Block<'a> {
    Listed(Range<usize>),
    Tile(TileView<'a>),
}

/// All rows of a step, in the order in which they are looked at.
struct Seating<'a> {
    /// Exact rows, then the step's own: source, cell, turn.
    listed: Vec<(Source, usize, i32)>,
    blocks: Vec<Block<'a>>,
}

impl<'a> Seating<'a> {
    fn new(plan: &Plan<'a>) -> Self {
        let exact = plan.exact().map(|(slot, cell, turn)| (Source::Slot(slot), cell, turn));
        let own = plan.tokens().enumerate().map(|(t, (cell, _))| (Source::Token(t), cell, 0));
        let listed: Vec<_> = exact.chain(own).collect();
        let cut = |r: Range<usize>| r.clone().step_by(TILE).map(move |at| Block::Listed(at..(at + TILE).min(r.end)));
        let first_own = listed.len() - plan.tokens().len();
        // Tokens begin a block of their own, so that only one block of each piece is seen in part.
        let blocks = cut(0..first_own).chain(cut(first_own..listed.len())).chain(plan.tiles().map(Block::Tile)).collect();
        Seating { listed, blocks }
    }

    /// Whether `n` tokens of a mask see a block. What they see of it is in `out` if it is neither all nor nothing.
    fn see(&self, block: &Block, mask: &Mask, n: usize, out: &mut [f32]) -> Seen {
        let (rows, run) = match block {
            Block::Listed(r) => {
                let first = self.listed[r.start].1;
                (r.len(), self.listed[r.clone()].iter().enumerate().all(|(i, (_, cell, _))| *cell == first + i).then_some(first))
            }
            Block::Tile(t) => (TILE, t.run().map(|(cell, _)| cell)),
        };
        if run.is_some_and(|first| (0..n).all(|t| mask.hides(t, first..first + rows))) {
            return Seen::Nothing;
        }
        let seen = match block {
            Block::Listed(r) => mask.see(n, rows, run, |row| Some(self.listed[r.start + row].1), out),
            Block::Tile(t) => mask.see(n, rows, run, |row| t.cell(row), out),
        };
        if rows == TILE || matches!(seen, Seen::Nothing) {
            return seen;
        }
        // Products have 64 rows always; those that do not exist are hidden.
        for out in out.chunks_exact_mut(TILE).take(n) {
            if matches!(seen, Seen::All) {
                out[..rows].fill(0.0);
            }
            out[rows..].fill(f32::NEG_INFINITY);
        }
        Seen::Some
    }
}

impl Mask<'_> {
    /// True when a token sees nothing of a run of cells.
    fn hides(&self, token: usize, cells: Range<usize>) -> bool {
        match *self {
            Mask::F16 { values, stride, n_kv } if cells.end <= n_kv => {
                let hidden = half::f16::NEG_INFINITY.to_bits();
                let bits: &[u16] = bytemuck::cast_slice(&values[token * stride + cells.start..token * stride + cells.end]);
                bits.iter().fold(0, |all, x| all | (x ^ hidden)) == 0
            }
            _ => false,
        }
    }

    /// The mask of the tokens from `token` on.
    fn from(&self, token: usize) -> Self {
        match *self {
            Mask::All => Mask::All,
            Mask::F16 { values, stride, n_kv } => Mask::F16 { values: &values[token * stride..], stride, n_kv },
            Mask::F32 { values, stride, n_kv } => Mask::F32 { values: &values[token * stride..], stride, n_kv },
        }
    }
}

/// What one head has stored.
struct Stored<'a> {
    head: usize,
    rows: ExactRows<'a>,
    pieces: Pieces,
}

#[derive(Default)]
struct Scratch {
    bases: Loaded,
    rebuilder: Rebuilder,
    prefill: Prefill,
    blocks: [RowBlock; STEP],
    /// What a piece sees of each block of a step.
    masks: Vec<f32>,
    /// By block and piece of a head: heads see alike.
    seen: Vec<Option<Seen>>,
    row: Vec<f32>,
    turn: Turn,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Layer {
    /// Pieces of a prefill of `n_tokens` query tokens, numbered by head.
    pub fn prefill_pieces(&self, n_tokens: usize) -> usize {
        self.shape().n_head_kv * n_tokens.div_ceil(TOKENS)
    }

    /// Attention of some pieces of any number of query tokens, the step's own rows among what is seen. `sinks` holds one logit per query head, or
    /// nothing. `put` gets each output row, numbered `token * n_head + head`.
    pub fn prefill(&self, pieces: Range<usize>, call: &Call, sinks: &[f32], mut put: impl FnMut(usize, &[f32])) -> Result<()> {
        let (g, n, plan) = (self.shape(), call.q.len(), call.plan);
        self.check_rows(plan, &[call.k, call.v])?;
        if n == 0 || pieces.end > self.prefill_pieces(n) || !(sinks.is_empty() || sinks.len() == g.n_head) {
            return argument(format!("{n} query tokens, pieces {pieces:?} of {}, {} sinks", self.prefill_pieces(n), sinks.len()));
        }
        call.scoring.check()?;
        self.check_arena(call.arena)?;
        let ranges = arena::heads(&self.geometry, self.index);
        let seating = Seating::new(plan);
        let per_head = n.div_ceil(TOKENS);
        let together = (QUERY_FLOATS / (TOKENS * g.group() * g.d_k.max(g.d_v))).max(1);
        if pieces.contains(&0) {
            let coded = plan.tiles().map(|t| (0..TILE).filter(|row| t.cell(*row).is_some()).count() as u64).sum();
            self.counters.reconstructed.fetch_add(coded, Relaxed);
        }
        SCRATCH.with_borrow_mut(|s| {
            s.seen.clear();
            s.seen.resize(seating.blocks.len() * per_head, None);
            let (mut at, mut loaded) = (pieces.start, None);
            while at < pieces.end {
                let head = at / per_head;
                let end = pieces.end.min((head + 1) * per_head).min(at + together);
                if loaded.replace(head) != Some(head) {
                    s.bases.load(self, call.arena, &ranges[head], plan)?;
                }
                // Later tokens see more of the step: equal shares of this order are about equal work.
                let order = |i: usize| if i.is_multiple_of(2) { i / 2 } else { per_head - 1 - i / 2 };
                let parts: Vec<usize> = (at % per_head..at % per_head + (end - at)).map(order).collect();
                self.prefill_head(s, call, head, &parts, &seating, &ranges[head], sinks, &mut put)?;
                at = end;
            }
            Ok(())
        })
    }

    /// Some pieces of one head, together; its bases have been loaded.
    #[expect(clippy::too_many_arguments, reason = "a call, a part of it, and what was prepared for all parts")]
    fn prefill_head(
        &self,
        s: &mut Scratch,
        call: &Call,
        head: usize,
        parts: &[usize],
        seating: &Seating,
        r: &HeadRanges,
        sinks: &[f32],
        put: &mut impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let (g, n, plan, group) = (self.shape(), call.q.len(), call.plan, self.shape().group());
        let context = Context { kernels: simd::kernels(), scoring: call.scoring, rope: &self.rope };
        let per_head = n.div_ceil(TOKENS);
        let tokens: Vec<usize> = parts.iter().flat_map(|p| p * TOKENS..((p + 1) * TOKENS).min(n)).collect();
        if let Some(t) = tokens.iter().find(|t| !(0..group).all(|a| call.q.is_finite(**t, head * group + a, g.d_k))) {
            return Err(Error::NotFinite(format!("query of token {t}, KV head {head}, in f16")));
        }
        let queries = (0..tokens.len() * group).map(|i| call.q.head(tokens[i / group], head * group + i % group, g.d_k));
        s.prefill.begin(g.d_k, g.d_v, group, call.scoring.scale, queries);
        let stored = Stored {
            head,
            rows: ExactRows::new(g, &call.arena[r.exact.clone()])?,
            pieces: Pieces::new(&self.geometry, self.index, head, &call.arena, r, (plan.fitted, plan.former))?,
        };
        s.masks.resize(STEP * TOKENS * TILE, 0.0);
        let lengths = || parts.iter().map(|p| (*p, TOKENS.min(n - p * TOKENS)));
        for first in (0..seating.blocks.len()).step_by(STEP) {
            let blocks = &seating.blocks[first..(first + STEP).min(seating.blocks.len())];
            for (i, block) in blocks.iter().enumerate() {
                let seen = &mut s.seen[(first + i) * per_head..][..per_head];
                for (p, n) in lengths() {
                    if seen[p].is_none() {
                        seen[p] = Some(seating.see(block, &call.mask.from(p * TOKENS), n, &mut s.masks));
                    }
                }
                if parts.iter().any(|p| !matches!(seen[*p], Some(Seen::Nothing))) {
                    self.rebuild_block(s, i, call, seating, &stored, block);
                }
            }
            let mut begin = 0;
            for (p, n) in lengths() {
                let mut shown = [(&s.blocks[0], Visible::All); STEP];
                let mut n_shown = 0;
                for ((i, block), mask) in blocks.iter().enumerate().zip(s.masks.chunks_exact_mut(TOKENS * TILE)) {
                    let visible = match s.seen[(first + i) * per_head + p] {
                        Some(Seen::All) => Visible::All,
                        Some(Seen::Some) => {
                            seating.see(block, &call.mask.from(p * TOKENS), n, mask);
                            Visible::Some(mask)
                        }
                        _ => continue,
                    };
                    shown[n_shown] = (&s.blocks[i], visible);
                    n_shown += 1;
                }
                if n_shown > 0 {
                    s.prefill.attend(context, begin, n, &shown[..n_shown]);
                }
                begin += n;
            }
        }
        let sinks = (!sinks.is_empty()).then(|| &sinks[head * group..(head + 1) * group]);
        s.prefill.finish(sinks, |i, out| put(tokens[i / group] * g.n_head + head * group + i % group, out));
        Ok(())
    }

    /// Rebuild block `i` of a step.
    fn rebuild_block(&self, s: &mut Scratch, i: usize, call: &Call, seating: &Seating, stored: &Stored, block: &Block) {
        let (g, out) = (self.shape(), &mut s.blocks[i]);
        match block {
            Block::Listed(range) => {
                out.clear(g.d_k, g.d_v);
                s.row.resize(g.d_k + g.d_v, 0.0);
                let (key, value) = s.row.split_at_mut(g.d_k);
                for (row, (source, _, turn)) in seating.listed[range.clone()].iter().enumerate() {
                    self.fetch_turned(stored.head, *source, *turn, &stored.rows, call, &mut s.turn, (key, value));
                    out.put(row, key, value);
                }
            }
            Block::Tile(t) => {
                let (kind, place) = stored.pieces.place(t.tile);
                let each: [i32; TILE] = std::array::from_fn(|row| t.turn(row));
                let turns = t.run().map(|(_, turn)| turn).or_else(|| t.one_turn()).map_or(Turns::Each(&each), Turns::One);
                let context = Context { kernels: simd::kernels(), scoring: call.scoring, rope: &self.rope };
                s.rebuilder.tile(context, s.bases.of(kind), stored.pieces.form(kind), &call.arena[place], turns, out);
            }
        }
    }
}
