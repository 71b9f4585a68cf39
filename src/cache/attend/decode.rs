//! Attention of steps of up to 64 tokens, from the codes.
//!
//! Work is cut into units of one KV head and one of [`crate::layout::Heads::chunks`] chunks of the rows, whatever the number of threads, so results do
//! not depend on it. Must not know how scores are computed, nor about threads.

use super::seating::{Block, Seating};
use super::{Call, Scratch, SCRATCH};
use crate::attention::{merge, no_rows, partial_floats, Context, Tile, Turns, Visible, BATCH};
use crate::cache::arena::bases_of;
use crate::cache::head::Head;
use crate::cache::mask::Seen;
use crate::cache::plan::Source;
use crate::cache::Layer;
use crate::error::{argument, Error, Result};
use crate::layout::geometry::Kind;
use crate::layout::{ANCHOR_GRID, MAX_QUERIES, TILE};
use crate::simd::{self, Ahead};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Blocks of 64 rows that a chunk has at least, if there are as many.
const LEAST_BLOCKS: usize = 4;

/// How many rows before it is read an exact row is asked for.
const ROWS_AHEAD: usize = 12;

/// Tiles that share a frame where rows stay in their order.
const FRAME_TILES: usize = ANCHOR_GRID as usize / TILE;

impl Layer {
    /// Floats of the partial results for `n_tokens` query tokens: `units() * unit_floats(n_tokens)`.
    pub fn partial_floats(&self, n_tokens: usize) -> usize {
        self.units() * self.unit_floats(n_tokens)
    }

    /// Independent pieces of one attention call, numbered `head * chunks + chunk`.
    pub fn units(&self) -> usize {
        self.shape().n_head_kv * self.shape().chunks()
    }

    /// Floats of one unit's result.
    pub fn unit_floats(&self, n_tokens: usize) -> usize {
        n_tokens * self.shape().group() * partial_floats(self.shape().d_v)
    }

    /// Attention of some units, the step's own rows among what is seen; `out` has their results one after another.
    pub fn attend(&self, units: Range<usize>, call: &Call, out: &mut [f32]) -> Result<()> {
        let (g, n) = (self.shape(), call.q.len());
        if n == 0 || n > MAX_QUERIES || units.end > self.units() {
            return argument(format!("{n} query tokens, units {units:?} of {}", self.units()));
        }
        let size = self.unit_floats(n);
        if out.len() < units.len() * size {
            return Err(Error::Buffer { need: units.len() * size, have: out.len() });
        }
        call.check(self)?;
        let seating = Seating::new(call.plan);
        SCRATCH.with_borrow_mut(|s| {
            let mut head: Option<Head> = None;
            for (unit, out) in units.zip(out.chunks_exact_mut(size)) {
                let (index, chunk) = (unit / g.chunks(), unit % g.chunks());
                if head.as_ref().is_none_or(|h| h.index != index) {
                    call.check_queries(self, index, 0..n)?;
                    head = Some(call.head(self, index, s)?);
                }
                if let Some(head) = &head {
                    self.attend_unit(s, call, head, &seating, chunk, out);
                }
            }
            Ok(())
        })
    }

    /// One KV head's query group over one chunk of the rows; its bases have been read.
    fn attend_unit(&self, s: &mut Scratch, call: &Call, head: &Head, seating: &Seating, chunk: usize, out: &mut [f32]) {
        let (g, n, count) = (self.shape(), call.q.len(), seating.len());
        let context = Context { kernels: simd::kernels(), scoring: call.scoring, rope: &self.rope };
        // In short contexts few chunks have all of it, as each costs a start and an end.
        let chunks = count.div_ceil(LEAST_BLOCKS).min(g.chunks());
        if chunk >= chunks {
            out.chunks_exact_mut(partial_floats(g.d_v)).for_each(no_rows);
            return;
        }
        let group = g.group();
        let queries = (0..n * group).map(|i| call.q.head(i / group, head.index * group + i % group, g.d_k));
        s.accumulator.begin(g.d_k, g.d_v, group, queries);
        let room = s.accumulator.batch();
        s.masks.resize(room * n * TILE, 0.0);
        s.turns.resize(room, [0; TILE]);
        let (mut exact_seen, mut coded_seen) = (0, 0);
        let mut batch = Batch::default();
        for block in seating.blocks(chunk * count / chunks..(chunk + 1) * count / chunks) {
            let Block::Tile(t) = &block else {
                exact_seen += self.attend_exact(s, call, context, head, seating, &block);
                continue;
            };
            let ((kind, place), turn) = (head.piece(t), t.run().map(|(_, turn)| turn).or_else(|| t.one_turn()));
            if batch.is_over(kind, turn, room) {
                batch.attend(s, context, head, call.arena);
            }
            let mask = &mut s.masks[batch.n * n * TILE..][..n * TILE];
            let seen = seating.see(&block, &call.mask, n, mask);
            coded_seen += count_seen(seen, mask, n, TILE);
            if seen == Seen::Nothing {
                continue;
            }
            if turn.is_none() {
                s.turns[batch.n] = std::array::from_fn(|row| t.turn(row));
            }
            batch.push(kind, place, turn, seen == Seen::All);
        }
        batch.attend(s, context, head, call.arena);
        batch.leave(s, context);
        s.accumulator.finish(out);
        if head.index == 0 {
            self.counters.attended_exact.fetch_add(exact_seen, Relaxed);
            self.counters.attended_coded.fetch_add(coded_seen, Relaxed);
        }
    }

    /// Attend to a block of exact rows; returns how many are seen, summed over the tokens.
    fn attend_exact(&self, s: &mut Scratch, call: &Call, context: Context, head: &Head, seating: &Seating, block: &Block) -> u64 {
        let Block::Exact(rows) = block else { return 0 };
        let (g, n, sources) = (self.shape(), call.q.len(), seating.exact(rows));
        let (mask, len) = (&mut s.masks[..n * TILE], sources.len());
        let seen = seating.see(block, &call.mask, n, mask);
        let visible = match seen {
            Seen::Nothing => return 0,
            Seen::All => Visible::All,
            Seen::Some => Visible::Some(mask),
        };
        s.rows_k.resize(TILE * g.d_k * 4);
        s.rows_v.resize(TILE * g.d_v * 4);
        let (keys, values) = (s.rows_k.floats_mut(), s.rows_v.floats_mut());
        for (i, ((source, _, turn), (key, value))) in sources.iter().zip(keys.chunks_exact_mut(g.d_k).zip(values.chunks_exact_mut(g.d_v))).enumerate()
        {
            if let Some((Source::Slot(slot), ..)) = sources.get(i + ROWS_AHEAD) {
                simd::ask_for(head.stored_row(*slot));
            }
            head.exact_row((*source, *turn), (call.k, call.v), &mut s.turn, key, value);
        }
        s.accumulator.exact_block(context, &keys[..len * g.d_k], &values[..len * g.d_v], visible);
        count_seen(seen, mask, n, len)
    }

    /// Merge the units of an attention call into rows `rows` of the output, where row `token * n_head + head` has `d_v` floats;
    /// `out` starts at the first of these rows. `sinks` holds one logit per query head, or nothing.
    pub fn combine(&self, n_tokens: usize, partials: &[f32], sinks: &[f32], rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let g = self.shape();
        if partials.len() < self.partial_floats(n_tokens) {
            return Err(Error::Buffer { need: self.partial_floats(n_tokens), have: partials.len() });
        }
        if rows.end > n_tokens * g.n_head || out.len() < rows.len() * g.d_v || !(sinks.is_empty() || sinks.len() == g.n_head) {
            return argument(format!("rows {rows:?} of {} into {} floats, {} sinks", n_tokens * g.n_head, out.len(), sinks.len()));
        }
        let size = partial_floats(g.d_v);
        for (row, out) in rows.zip(out.chunks_exact_mut(g.d_v)) {
            let (token, query_head) = (row / g.n_head, row % g.n_head);
            let (head, a) = (query_head / g.group(), query_head % g.group());
            let chunk = |c: usize| {
                let unit = &partials[(head * g.chunks() + c) * self.unit_floats(n_tokens)..][..self.unit_floats(n_tokens)];
                &unit[(token * g.group() + a) * size..][..size]
            };
            merge((0..g.chunks()).map(chunk), sinks.get(query_head).copied(), out);
        }
        Ok(())
    }
}

/// How many of a block's rows are seen, summed over `n` tokens.
fn count_seen(seen: Seen, mask: &[f32], n: usize, rows: usize) -> u64 {
    match seen {
        Seen::Nothing => 0,
        Seen::All => (n * rows) as u64,
        Seen::Some => mask.chunks_exact(TILE).flat_map(|m| &m[..rows]).filter(|m| **m != f32::NEG_INFINITY).count() as u64,
    }
}

/// Tiles of one kind that will be attended to together; masks and turns are in [`Scratch`], at a tile's number in the batch.
#[derive(Default)]
struct Batch {
    n: usize,
    kind: Kind,
    /// Bytes of each tile, its turn when all rows share one, and whether all of it is seen.
    tiles: [(Range<usize>, Option<i32>, bool); BATCH],
    /// The kind whose value sums have not left their basis yet.
    summed: Option<Kind>,
}

impl Batch {
    /// True when a tile cannot join the others, or better begins the next batch: tiles with the same frame stay together where they can.
    fn is_over(&self, kind: Kind, turn: Option<i32>, batch: usize) -> bool {
        if self.n == 0 {
            return false;
        }
        let another_frame = self.tiles[self.n - 1].1 != turn;
        self.n == batch || self.kind != kind || another_frame && self.n + FRAME_TILES > batch
    }

    fn push(&mut self, kind: Kind, bytes: Range<usize>, turn: Option<i32>, all: bool) {
        (self.tiles[self.n], self.kind) = ((bytes, turn, all), kind);
        self.n += 1;
    }

    fn attend(&mut self, s: &mut Scratch, context: Context, head: &Head, arena: &[u8]) {
        if self.n == 0 {
            return;
        }
        if self.summed.is_some_and(|kind| bases_of(kind) != bases_of(self.kind)) {
            self.leave(s, context);
        }
        self.summed = Some(self.kind);
        let per_tile = s.masks.len() / s.turns.len();
        let tiles: [Tile; BATCH] = std::array::from_fn(|i| {
            let i = i.min(self.n - 1);
            let (range, turn, all) = &self.tiles[i];
            Tile {
                bytes: &arena[range.clone()],
                turns: turn.map_or(Turns::Each(&s.turns[i]), Turns::One),
                visible: if *all { Visible::All } else { Visible::Some(&s.masks[i * per_tile..][..per_tile]) },
            }
        });
        s.accumulator.tile_batch(context, s.bases.of(self.kind), head.form(self.kind), &tiles[..self.n], self.ahead(arena));
        self.n = 0;
    }

    /// What will most likely be read next: as many pieces, as far behind these.
    fn ahead(&self, arena: &[u8]) -> Ahead {
        let (first, last) = (&self.tiles[0].0, &self.tiles[self.n - 1].0);
        let stride = if self.n > 1 { self.tiles[1].0.start.abs_diff(first.start) } else { first.len() };
        Ahead::pieces(arena, last.start + stride, first.len(), stride, self.n)
    }

    /// Value sums leave their basis.
    fn leave(&mut self, s: &mut Scratch, context: Context) {
        if let Some(kind) = self.summed.take() {
            s.accumulator.leave(context.kernels, s.bases.of(kind));
        }
    }
}
