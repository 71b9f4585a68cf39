//! Attention of one layer over its arena, as the plan says: which rows, which of them are seen, in which pieces.
//!
//! Work is cut into units of one KV head and one of [`crate::config::Heads::chunks`] chunks of the rows, whatever the number of threads, so results do not depend on it.
//! Must not know how scores are computed, nor about threads.

use super::arena::{self, bases_of, Bases, ExactRows, Pieces};
use super::geometry::{HeadRanges, Kind};
use super::input::{Mask, Rows};
use super::layer::Layer;
use super::plan::{Plan, Source, TileView};
use crate::attention::{merge, no_rows, partial_floats, Accumulator, Context, HeadBases, Scoring, Tile, Turns, Visible, BATCH};
use crate::codec::Basis;
use crate::config::{ANCHOR_GRID, MAX_QUERIES, TILE};
use crate::error::{argument, Error, Result};
use crate::rope::Turn;
use crate::simd::{self, Ahead, Lines};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Blocks of 64 rows that a chunk has at least, if there are as many.
const LEAST_BLOCKS: usize = 4;

/// Tiles that share a frame where rows stay in their order.
const FRAME_TILES: usize = ANCHOR_GRID as usize / TILE;

/// One attention call.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// The layer's bytes.
    pub arena: &'a [u8],
    /// The step.
    pub plan: &'a Plan<'a>,
    /// Queries; decode takes 1 to 64 tokens.
    pub q: &'a Rows<'a>,
    /// Keys of the step's own tokens.
    pub k: &'a Rows<'a>,
    /// Their values.
    pub v: &'a Rows<'a>,
    /// Scale and soft cap.
    pub scoring: Scoring,
    /// Who sees what.
    pub mask: Mask<'a>,
}

/// At most 64 rows.
enum Block<'a> {
    Exact(usize, usize),
    Tokens(usize, usize),
    Tile(TileView<'a>),
}

/// The bases of a head, as far as a plan's tiles need them.
#[derive(Default)]
pub(super) struct Loaded {
    fitted: HeadBases,
    plain: HeadBases,
    former: HeadBases,
}

impl Loaded {
    /// Load those of a head.
    pub(super) fn load(&mut self, layer: &Layer, arena: &[u8], r: &HeadRanges, plan: &Plan) -> Result<()> {
        let (g, first, first_former) = (layer.shape(), layer.geometry().tiles, layer.geometry().former(0));
        if plan.tiles().any(|t| t.tile < first) {
            self.fitted.load(arena[r.bases.clone()].split_at(Basis::bytes_of(g.d_k)), g.d_k, g.d_v)?;
        }
        if plan.former {
            self.former.load(arena[r.former_bases()].split_at(Basis::decoder_bytes_of(g.d_k)), g.d_k, g.d_v)?;
        }
        if plan.tiles().any(|t| (first..first_former).contains(&t.tile)) {
            let (k, v) = arena::plain(g, &arena[r.plain.clone()], layer.geometry().waiting_bits);
            self.plain = HeadBases::of(k, v);
        }
        Ok(())
    }
    /// Those of a kind of tile.
    pub(super) fn of(&self, kind: Kind) -> &HeadBases {
        match bases_of(kind) {
            Bases::Fitted => &self.fitted,
            Bases::Plain => &self.plain,
            Bases::Former => &self.former,
        }
    }
}

#[derive(Default)]
struct Scratch {
    bases: Loaded,
    rows_k: Lines,
    rows_v: Lines,
    accumulator: Accumulator,
    /// For each tile of a batch: a mask, and turns of its rows.
    masks: Vec<f32>,
    turns: Vec<[i32; TILE]>,
    turn: Turn,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// How the tokens see some rows.
#[derive(Clone, Copy)]
pub(super) enum Seen {
    Nothing,
    All,
    /// The mask has been written.
    Some,
}

impl Mask<'_> {
    fn at(&self, token: usize, cell: usize) -> f32 {
        match *self {
            Mask::All => 0.0,
            Mask::F16 { values, stride, n_kv } if cell < n_kv => values[token * stride + cell].to_f32(),
            Mask::F32 { values, stride, n_kv } if cell < n_kv => values[token * stride + cell],
            _ => f32::NEG_INFINITY,
        }
    }

    /// True when a token sees a run of cells and nothing is added.
    fn shows(&self, token: usize, cells: Range<usize>) -> bool {
        match *self {
            Mask::All => true,
            Mask::F16 { stride, n_kv, .. } | Mask::F32 { stride, n_kv, .. } if cells.end > n_kv || n_kv > stride && token > 0 => false,
            Mask::F16 { values, stride, .. } => {
                let bits: &[u16] = bytemuck::cast_slice(&values[token * stride + cells.start..token * stride + cells.end]);
                bits.iter().fold(0, |all, x| all | x) == 0
            }
            Mask::F32 { values, stride, .. } => values[token * stride + cells.start..token * stride + cells.end].iter().all(|x| *x == 0.0),
        }
    }

    /// Write what `n` tokens see of rows in `cells` to `out[token * TILE + row]`, unless it is everything or nothing. `run` is the cells' first, when they
    /// follow each other without a gap.
    pub(super) fn see(&self, n: usize, rows: usize, run: Option<usize>, cell: impl Fn(usize) -> Option<usize>, out: &mut [f32]) -> Seen {
        if run.is_some_and(|first| (0..n).all(|t| self.shows(t, first..first + rows))) {
            return Seen::All;
        }
        let mut seen = false;
        for (token, out) in out.chunks_exact_mut(TILE).enumerate().take(n) {
            for (row, out) in out.iter_mut().enumerate().take(rows) {
                *out = cell(row).map_or(f32::NEG_INFINITY, |cell| self.at(token, cell));
                seen |= *out != f32::NEG_INFINITY;
            }
        }
        if seen {
            Seen::Some
        } else {
            Seen::Nothing
        }
    }
}

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

    /// Exact rows, then tiles, band by band: those of rows that wait come after all others, and then those in the former bases.
    fn blocks<'a>(plan: &Plan<'a>) -> impl Iterator<Item = Block<'a>> {
        let cut = |n: usize| (0..n).step_by(TILE).map(move |at| (at, (at + TILE).min(n)));
        cut(plan.exact().len())
            .map(|(a, b)| Block::Exact(a, b))
            .chain(cut(plan.tokens().len()).map(|(a, b)| Block::Tokens(a, b)))
            .chain(plan.tiles().map(Block::Tile))
    }

    /// Attention of some units, the step's own rows among what is seen; `out` has their results one after another.
    pub fn attend(&self, units: Range<usize>, call: &Call, out: &mut [f32]) -> Result<()> {
        let (g, n) = (self.shape(), call.q.len());
        self.check_rows(call.plan, &[call.k, call.v])?;
        if n == 0 || n > MAX_QUERIES || units.end > self.units() {
            return argument(format!("{n} query tokens, units {units:?} of {}", self.units()));
        }
        let size = self.unit_floats(n);
        if out.len() < units.len() * size {
            return Err(Error::Buffer { need: units.len() * size, have: out.len() });
        }
        call.scoring.check()?;
        self.check_arena(call.arena)?;
        let ranges = arena::heads(&self.geometry, self.index);
        SCRATCH.with_borrow_mut(|s| {
            let mut loaded = None;
            for (unit, out) in units.zip(out.chunks_exact_mut(size)) {
                let (head, chunk) = (unit / g.chunks(), unit % g.chunks());
                let r = &ranges[head];
                if loaded != Some(head) {
                    loaded = Some(head);
                    if let Some(t) = (0..n).find(|t| !(0..g.group()).all(|a| call.q.is_finite(*t, head * g.group() + a, g.d_k))) {
                        return Err(Error::NotFinite(format!("query of token {t}, KV head {head}, in f16")));
                    }
                    s.bases.load(self, call.arena, r, call.plan)?;
                }
                self.attend_unit(s, call, head, chunk, r, out)?;
            }
            Ok(())
        })
    }

    /// One KV head's query group over one chunk of the rows; its bases have been loaded.
    fn attend_unit(&self, s: &mut Scratch, call: &Call, head: usize, chunk: usize, r: &HeadRanges, out: &mut [f32]) -> Result<()> {
        let (g, n, plan) = (self.shape(), call.q.len(), call.plan);
        let context = Context { kernels: simd::kernels(), scoring: call.scoring, rope: &self.rope };
        let count = plan.exact().len().div_ceil(TILE) + plan.tokens().len().div_ceil(TILE) + plan.tiles().len();
        // In short contexts few chunks have all of it, as each costs a start and an end.
        let chunks = count.div_ceil(LEAST_BLOCKS).min(g.chunks());
        if chunk >= chunks {
            out.chunks_exact_mut(partial_floats(g.d_v)).for_each(no_rows);
            return Ok(());
        }
        let (first, last) = (chunk * count / chunks, (chunk + 1) * count / chunks);
        let rows = ExactRows::new(g, &call.arena[r.exact.clone()])?;
        let pieces = Pieces::new(&self.geometry, self.index, head, &call.arena, r, (plan.fitted, plan.former))?;
        let group = g.group();
        let queries = (0..n * group).map(|i| call.q.head(i / group, head * group + i % group, g.d_k));
        s.accumulator.begin(g.d_k, g.d_v, group, queries);
        let batch = s.accumulator.batch();
        s.masks.resize(batch * n * TILE, 0.0);
        s.turns.resize(batch, [0; TILE]);
        let (mut exact_seen, mut coded_seen) = (0u64, 0u64);
        let mut waiting = Batch::default();
        for block in Self::blocks(plan).skip(first).take(last - first) {
            let Block::Tile(t) = &block else {
                exact_seen += self.exact_block(s, call, context, head, &block, &rows);
                continue;
            };
            let ((kind, place), run) = (pieces.place(t.tile), t.run());
            let turn = run.map(|(_, turn)| turn).or_else(|| t.one_turn());
            if waiting.is_over(kind, turn, batch) {
                waiting.attend(s, context, &pieces, call.arena);
            }
            let i = waiting.n;
            let mask = &mut s.masks[i * n * TILE..][..n * TILE];
            let visible = call.mask.see(n, TILE, run.map(|(cell, _)| cell), |row| t.cell(row), mask);
            coded_seen += match visible {
                Seen::Nothing => continue,
                Seen::All => (n * TILE) as u64,
                Seen::Some => mask.iter().filter(|m| **m != f32::NEG_INFINITY).count() as u64,
            };
            if turn.is_none() {
                s.turns[i] = std::array::from_fn(|row| t.turn(row));
            }
            waiting.push(kind, place, turn, matches!(visible, Seen::All));
        }
        waiting.attend(s, context, &pieces, call.arena);
        waiting.leave(s, context);
        s.accumulator.finish(out);
        if head == 0 {
            self.counters.attended_exact.fetch_add(exact_seen, Relaxed);
            self.counters.attended_coded.fetch_add(coded_seen, Relaxed);
        }
        Ok(())
    }

    /// Attend to a block of exact rows; returns how many are seen, summed over the tokens.
    fn exact_block(&self, s: &mut Scratch, call: &Call, context: Context, head: usize, block: &Block, rows: &ExactRows) -> u64 {
        let (g, n) = (self.shape(), call.q.len());
        let mut sources = [(Source::Slot(0), 0, 0); TILE];
        let mut len = 0;
        let mut put = |source: Source, cell: usize, turn: i32| {
            sources[len] = (source, cell, turn);
            len += 1;
        };
        match block {
            Block::Exact(a, b) => call.plan.exact_in(*a..*b).for_each(|(slot, cell, turn)| put(Source::Slot(slot), cell, turn)),
            Block::Tokens(a, b) => call.plan.tokens().enumerate().take(*b).skip(*a).for_each(|(t, (cell, _))| put(Source::Token(t), cell, 0)),
            Block::Tile(_) => {}
        }
        let sources = &sources[..len];
        let run = sources.iter().enumerate().all(|(i, (_, cell, _))| *cell == sources[0].1 + i).then_some(sources[0].1);
        let mask = &mut s.masks[..n * TILE];
        // Rows behind the last are hidden where a mask is needed at all.
        let visible = match call.mask.see(n, len, run, |row| Some(sources[row].1), mask) {
            Seen::Nothing => return 0,
            Seen::All => Visible::All,
            Seen::Some => Visible::Some(mask),
        };
        s.rows_k.resize(TILE * g.d_k * 4);
        s.rows_v.resize(TILE * g.d_v * 4);
        let (keys, values) = (s.rows_k.floats_mut(), s.rows_v.floats_mut());
        for ((source, _, turn), (key, value)) in sources.iter().zip(keys.chunks_exact_mut(g.d_k).zip(values.chunks_exact_mut(g.d_v))) {
            self.fetch_turned(head, *source, *turn, rows, call, &mut s.turn, (key, value));
        }
        s.accumulator.exact_block(context, &keys[..len * g.d_k], &values[..len * g.d_v], visible);
        match visible {
            Visible::All => (n * len) as u64,
            Visible::Some(mask) => mask.chunks_exact(TILE).flat_map(|m| &m[..len]).filter(|m| **m != f32::NEG_INFINITY).count() as u64,
        }
    }

    /// Key and value of a source as f32, the key rotated by `turn` to where it is now. `angles` is memory to work in.
    #[expect(clippy::too_many_arguments, reason = "a row's place, and where its two halves go")]
    pub(super) fn fetch_turned(
        &self,
        head: usize,
        source: Source,
        turn: i32,
        rows: &ExactRows,
        call: &Call,
        angles: &mut Turn,
        to: (&mut [f32], &mut [f32]),
    ) {
        let (key, value) = to;
        self.fetch(head, source, rows, Some((call.k, call.v)), key, value);
        if turn != 0 {
            self.rope.turn(i64::from(turn), angles);
            self.rope.rotate(angles, key);
        }
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

    fn attend(&mut self, s: &mut Scratch, context: Context, pieces: &Pieces, arena: &[u8]) {
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
        s.accumulator.tile_batch(context, s.bases.of(self.kind), pieces.form(self.kind), &tiles[..self.n], self.ahead(arena));
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
