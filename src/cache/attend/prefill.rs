//! Attention of steps of any length: rows are rebuilt a tile at a time, and nothing of a layer's rows is kept.
//!
//! Work is cut into pieces of one KV head and [`TOKENS`] query tokens. A result depends on its own piece only, so pieces may be shared out in any way;
//! those of a head that are computed together share the rebuilding of its tiles. Must not know how scores are computed, nor about threads.

use super::seating::{Block, Seating};
use super::{Call, Scratch, SCRATCH};
use crate::attention::prefill::STEP;
use crate::attention::{Context, Turns, Visible};
use crate::cache::head::Head;
use crate::cache::mask::Seen;
use crate::cache::Layer;
use crate::error::{argument, Result};
use crate::layout::TILE;
use crate::simd;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Query tokens of a piece.
const TOKENS: usize = 64;
/// Floats that the queries of pieces computed together may take, and their output as well: a core's second cache holds both.
const QUERY_FLOATS: usize = 1 << 18;

/// What all pieces of a call have in common.
struct Task<'a> {
    call: &'a Call<'a>,
    seating: &'a Seating<'a>,
    blocks: Vec<Block<'a>>,
    /// One logit per query head, or nothing.
    sinks: &'a [f32],
}

impl Task<'_> {
    /// Pieces of a head.
    fn per_head(&self) -> usize {
        self.call.q.len().div_ceil(TOKENS)
    }

    /// The query tokens of a piece.
    fn tokens(&self, piece: usize) -> Range<usize> {
        piece * TOKENS..((piece + 1) * TOKENS).min(self.call.q.len())
    }
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
        if n == 0 || pieces.end > self.prefill_pieces(n) || !(sinks.is_empty() || sinks.len() == g.n_head) {
            return argument(format!("{n} query tokens, pieces {pieces:?} of {}, {} sinks", self.prefill_pieces(n), sinks.len()));
        }
        call.check(self)?;
        let seating = Seating::new(plan);
        let task = Task { call, seating: &seating, blocks: seating.blocks(0..seating.len()).collect(), sinks };
        let (per_head, together) = (task.per_head(), (QUERY_FLOATS / (TOKENS * g.group() * g.d_k.max(g.d_v))).max(1));
        if pieces.contains(&0) {
            let coded = plan.tiles().map(|t| (0..TILE).filter(|row| t.cell(*row).is_some()).count() as u64).sum();
            self.counters.reconstructed.fetch_add(coded, Relaxed);
        }
        // Later tokens see more of the step: equal shares of this order are about equal work.
        let order = |i: usize| if i.is_multiple_of(2) { i / 2 } else { per_head - 1 - i / 2 };
        SCRATCH.with_borrow_mut(|s| {
            s.seen.clear();
            s.seen.resize(task.blocks.len() * per_head, None);
            let (mut at, mut head) = (pieces.start, None::<Head>);
            while at < pieces.end {
                let index = at / per_head;
                let end = pieces.end.min((index + 1) * per_head).min(at + together);
                let parts: Vec<usize> = (at % per_head..at % per_head + (end - at)).map(order).collect();
                let tokens: Vec<usize> = parts.iter().flat_map(|p| task.tokens(*p)).collect();
                call.check_queries(self, index, tokens.iter().copied())?;
                let head = match &mut head {
                    Some(head) if head.index == index => head,
                    other => other.insert(call.head(self, index, s)?),
                };
                self.prefill_head(s, &task, head, &parts, &tokens, &mut put);
                at = end;
            }
            Ok(())
        })
    }

    /// Some pieces of one head, together; its bases have been read.
    fn prefill_head(&self, s: &mut Scratch, task: &Task, head: &Head, parts: &[usize], tokens: &[usize], put: &mut impl FnMut(usize, &[f32])) {
        let (g, call, group) = (self.shape(), task.call, self.shape().group());
        let first_head = head.index * group;
        let queries = (0..tokens.len() * group).map(|i| call.q.head(tokens[i / group], first_head + i % group, g.d_k));
        s.prefill.begin(g.d_k, g.d_v, group, call.scoring.scale, queries);
        s.masks.resize(STEP * TOKENS * TILE, 0.0);
        for first in (0..task.blocks.len()).step_by(STEP) {
            let step = first..(first + STEP).min(task.blocks.len());
            self.rebuild_blocks(s, task, head, parts, step.clone());
            self.attend_to_blocks(s, task, parts, step);
        }
        let sinks = (!task.sinks.is_empty()).then(|| &task.sinks[first_head..first_head + group]);
        s.prefill.finish(sinks, |i, out| put(tokens[i / group] * g.n_head + first_head + i % group, out));
    }

    /// Rebuild those of some blocks of which a piece sees something.
    fn rebuild_blocks(&self, s: &mut Scratch, task: &Task, head: &Head, parts: &[usize], step: Range<usize>) {
        let per_head = task.per_head();
        for (i, (at, block)) in step.clone().zip(&task.blocks[step]).enumerate() {
            let seen = &mut s.seen[at * per_head..][..per_head];
            for p in parts {
                let tokens = task.tokens(*p);
                let see = || task.seating.see_whole(block, &task.call.mask.from(tokens.start), tokens.len(), &mut s.masks);
                seen[*p].get_or_insert_with(see);
            }
            if parts.iter().any(|p| seen[*p] != Some(Seen::Nothing)) {
                self.rebuild_block(s, i, task, head, block);
            }
        }
    }

    /// Let pieces look at some blocks that were rebuilt.
    fn attend_to_blocks(&self, s: &mut Scratch, task: &Task, parts: &[usize], step: Range<usize>) {
        let context = Context { kernels: simd::kernels(), scoring: task.call.scoring, rope: &self.rope };
        let (per_head, mut begin) = (task.per_head(), 0);
        for p in parts {
            let tokens = task.tokens(*p);
            let mut shown = [(&s.blocks[0], Visible::All); STEP];
            let mut n_shown = 0;
            let masks = s.masks.chunks_exact_mut(TOKENS * TILE);
            for (((at, block), rebuilt), mask) in step.clone().zip(&task.blocks[step.clone()]).zip(&s.blocks).zip(masks) {
                let visible = match s.seen[at * per_head + p] {
                    Some(Seen::All) => Visible::All,
                    Some(Seen::Some) => {
                        task.seating.see_whole(block, &task.call.mask.from(tokens.start), tokens.len(), mask);
                        Visible::Some(mask)
                    }
                    _ => continue,
                };
                shown[n_shown] = (rebuilt, visible);
                n_shown += 1;
            }
            if n_shown > 0 {
                s.prefill.attend(context, begin, tokens.len(), &shown[..n_shown]);
            }
            begin += tokens.len();
        }
    }

    /// Rebuild one block, as number `i` of those that are looked at together.
    fn rebuild_block(&self, s: &mut Scratch, i: usize, task: &Task, head: &Head, block: &Block) {
        let (g, call, out) = (self.shape(), task.call, &mut s.blocks[i]);
        match block {
            Block::Exact(rows) => {
                out.clear(g.d_k, g.d_v);
                s.row.resize(g.d_k + g.d_v, 0.0);
                let (key, value) = s.row.split_at_mut(g.d_k);
                for (row, (source, _, turn)) in task.seating.exact(rows).iter().enumerate() {
                    head.exact_row((*source, *turn), (call.k, call.v), &mut s.turn, key, value);
                    out.put(row, key, value);
                }
            }
            Block::Tile(t) => {
                let (kind, place) = head.piece(t);
                let each: [i32; TILE] = std::array::from_fn(|row| t.turn(row));
                let turns = t.run().map(|(_, turn)| turn).or_else(|| t.one_turn()).map_or(Turns::Each(&each), Turns::One);
                let context = Context { kernels: simd::kernels(), scoring: call.scoring, rope: &self.rope };
                s.rebuilder.tile(context, s.bases.of(kind), head.form(kind), &call.arena[place], turns, out);
            }
        }
    }
}
