//! The plan of one step of one stream: everything that changes from step to step, as an array of 32-bit integers.
//!
//! A plan is what the table tells the layers. It can be copied, sent to a device and replayed; it holds no pointers.
//! Sections follow the header in the order of the fields of [`Plan`]. Must not know what a row contains.

use crate::error::{Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::{BANDS, QUERY_SLOTS, RECENT_QUERIES, TILE};

const MAGIC: i32 = 0x534b_5650;
const VERSION: i32 = 6;
const HEADER: usize = 17;
const TILE_INTS: usize = 1 + 2 * TILE;
const MOVE: i32 = 0;
const RECODE: i32 = 1;
const SEAL: i32 = 2;
const MOVE_INTS: usize = 3;
const SEAL_INTS: usize = 2 + 2 * TILE + WITNESSES;
/// Most rows of a fit's sample.
pub const FIT_ROWS_MAX: usize = 3072;
/// The fewest rows that were stored before a step for which its fit is worth replaying.
const FIT_ROWS_LEAST: usize = 384;
/// Most queries that tell which rows of a tile draw attention.
pub const WITNESSES: usize = 16;
/// In place of a witness that is not there.
const NOBODY: i32 = i32::MIN;
/// Rows of tiles are numbered from here on where slots are numbers, too.
const CODED: i32 = 1 << 30;
const FIT_ROW_INTS: usize = 4;
const FIT_QUERY_INTS: usize = 3;

/// Where a row or a query is: in a slot, in a tile, or a token of this ubatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Exact slot, or slot of recent queries.
    Slot(usize),
    /// Token of the current ubatch.
    Token(usize),
    /// Row of a tile, as `tile * 64 + row`.
    Coded(usize),
}

impl Source {
    fn to_int(self) -> i32 {
        match self {
            Source::Slot(s) => s as i32,
            Source::Token(t) => -1 - t as i32,
            Source::Coded(row) => CODED + row as i32,
        }
    }
    fn from_int(i: i32) -> Self {
        if i >= CODED {
            Source::Coded((i - CODED) as usize)
        } else if i >= 0 {
            Source::Slot(i as usize)
        } else {
            Source::Token((-1 - i) as usize)
        }
    }
}

/// A row on its way into a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealRow {
    /// Where it is now.
    pub source: Source,
    /// Position difference to rotate the stored key by, to reach the tile's frame.
    pub turn: i32,
}

/// What a tile is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filling {
    /// The rows.
    pub rows: [SealRow; TILE],
    /// Queries that came some time after all of the rows: recent ones, or the step's own.
    pub witnesses: [Option<Source>; WITNESSES],
}

/// A change to the tiles. Changes happen in their order: a tile may be emptied and filled again in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<F> {
    /// A coded row moves within its band, as `tile * 64 + row`.
    Move {
        /// Row to move.
        from: usize,
        /// Where it goes.
        to: usize,
    },
    /// A tile is coded again, in a later band or because there are bases now or other ones, and then free.
    Recode {
        /// Tile that ages or waited, or one in the former bases under its number as such.
        from: usize,
        /// Tile it becomes.
        to: usize,
    },
    /// A tile is filled.
    Seal {
        /// The tile.
        tile: usize,
        /// With what.
        filling: F,
    },
}

/// A fit that is prepared in the steps before it: each studies some heads. A study whose id a layer does not know has seen nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Study {
    /// Tells studies apart, in a process; 0 for none, below that one to forget.
    pub id: i32,
    /// First KV head to study in this step, counted over all layers.
    pub from: i32,
    /// The one after the last.
    pub to: i32,
}

/// Owned contents of a plan, as the table makes it.
#[derive(Debug, Clone, Default)]
pub struct PlanData {
    /// Number of this plan in its table; never 0.
    pub epoch: i32,
    /// Tells the table's stream from others, in a process: what layers see of drift is noted under it.
    pub stream: i32,
    /// Bases come in this step.
    pub fit: bool,
    /// All heads were studied before this step, so that bits are shared out over all layers; else each layer studies its heads now.
    pub shared: bool,
    /// Bases exist before this step.
    pub fitted: bool,
    /// Before this step some tiles are in the former bases: see [`Geometry::former`].
    pub former: bool,
    /// What is known already of the heads to be fitted, or becomes known in this step.
    pub study: Study,
    /// New tokens: `(cell, slot)`, slot -1 when the token is sealed at once.
    pub tokens: Vec<(u32, i32)>,
    /// Live exact rows before this step: `(slot, cell, turn)`.
    pub exact: Vec<(u32, u32, i32)>,
    /// What happens to the tiles, in order.
    pub changes: Vec<Change<Filling>>,
    /// Queries to keep for the fit: `(token, query slot)`.
    pub records: Vec<(u32, u32)>,
    /// Queries to keep as recent ones: `(token, slot)`.
    pub recents: Vec<(u32, u32)>,
    /// Rows to fit on: source, turn into a tile frame (of a coded one: out of it), position, sequence.
    pub fit_rows: Vec<(SealRow, i32, i32)>,
    /// Queries to fit on: `(query slot, position, sequence)`.
    pub fit_queries: Vec<(u32, i32, i32)>,
}

/// Whether replaying a fit on these rows is pointless: too few of them were stored before the step. What was studied before, or comes from a
/// calibration, needs none.
pub fn replay_is_lost(g: &Geometry, shared: bool, sources: impl Iterator<Item = Source>) -> bool {
    !g.config.calibrated && !shared && sources.filter(|s| !matches!(s, Source::Token(_))).count() < FIT_ROWS_LEAST
}

/// Ints of the longest plan for `n_tokens` new tokens.
pub fn capacity(g: &Geometry, n_tokens: usize) -> usize {
    let seals = if g.tiles > 0 { (g.exact + n_tokens) / TILE + 1 } else { 0 };
    // Room for a seal may take a recode for each band, or the moves of a tile.
    let changes = seals * (SEAL_INTS + MOVE_INTS * (BANDS + TILE)) + (g.tiles + g.waiting) * MOVE_INTS;
    let records = if g.keeps_queries() { n_tokens } else { 0 };
    let recents = if g.tiles > 0 { n_tokens.min(RECENT_QUERIES) } else { 0 };
    let rows = g.exact + g.waiting * TILE + n_tokens;
    let sample = if g.keeps_queries() { FIT_ROWS_MAX.min(rows) * FIT_ROW_INTS + QUERY_SLOTS * FIT_QUERY_INTS } else { 0 };
    HEADER + 2 * n_tokens + 3 * g.exact + (g.tiles + g.waiting) * TILE_INTS + changes + 2 * (records + recents) + sample
}

impl PlanData {
    /// Write in transport form; `tiles` yields the tiles in use: tile, and what writes cell, or -1, and turn of each of its rows.
    pub fn write(&self, tiles: impl Iterator<Item = (u32, impl FnOnce(&mut [i32]))>, out: &mut [i32]) -> Result<usize> {
        let mut w = Writer { out, at: HEADER };
        let mut counts = [0i32; 8];
        counts[0] = w.items(self.tokens.iter().map(|t| [t.0 as i32, t.1]))?;
        counts[1] = w.items(self.exact.iter().map(|e| [e.0 as i32, e.1 as i32, e.2]))?;
        for (tile, rows) in tiles {
            w.put(tile as i32)?;
            rows(w.next(2 * TILE)?);
            counts[2] += 1;
        }
        let changes_at = w.at;
        for change in &self.changes {
            match change {
                Change::Move { from, to } => w.puts([MOVE, *from as i32, *to as i32])?,
                Change::Recode { from, to } => w.puts([RECODE, *from as i32, *to as i32])?,
                Change::Seal { tile, filling } => {
                    w.puts([SEAL, *tile as i32])?;
                    filling.rows.iter().try_for_each(|r| w.puts([r.source.to_int(), r.turn]))?;
                    w.puts(filling.witnesses.map(|s| s.map_or(NOBODY, Source::to_int)))?;
                }
            }
        }
        // Changes differ in length: the header has their ints.
        counts[3] = (w.at - changes_at) as i32;
        counts[4] = w.items(self.records.iter().map(|r| [r.0 as i32, r.1 as i32]))?;
        counts[5] = w.items(self.recents.iter().map(|r| [r.0 as i32, r.1 as i32]))?;
        counts[6] = w.items(self.fit_rows.iter().map(|(r, pos, seq)| [r.source.to_int(), r.turn, *pos, *seq]))?;
        counts[7] = w.items(self.fit_queries.iter().map(|q| [q.0 as i32, q.1, q.2]))?;
        let used = w.at;
        out[..HEADER].copy_from_slice(&[
            MAGIC,
            VERSION,
            self.epoch,
            i32::from(self.fit) | i32::from(self.fitted) << 1 | i32::from(self.shared) << 2 | i32::from(self.former) << 3,
            counts[0],
            counts[1],
            counts[2],
            counts[3],
            counts[4],
            counts[5],
            counts[6],
            counts[7],
            used as i32,
            self.study.id,
            self.study.from,
            self.study.to,
            self.stream,
        ]);
        Ok(used)
    }
}

struct Writer<'a> {
    out: &'a mut [i32],
    at: usize,
}

impl Writer<'_> {
    /// Room for the next ints.
    fn next(&mut self, n: usize) -> Result<&mut [i32]> {
        let (have, at) = (self.out.len(), self.at);
        self.at += n;
        self.out.get_mut(at..at + n).ok_or(Error::Buffer { need: at + n, have })
    }
    fn put(&mut self, x: i32) -> Result<()> {
        self.next(1)?[0] = x;
        Ok(())
    }
    fn puts<const N: usize>(&mut self, ints: [i32; N]) -> Result<()> {
        ints.into_iter().try_for_each(|x| self.put(x))
    }
    fn items<const N: usize>(&mut self, items: impl Iterator<Item = [i32; N]>) -> Result<i32> {
        let mut n = 0;
        for item in items {
            self.puts(item)?;
            n += 1;
        }
        Ok(n)
    }
}

/// A plan in transport form, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// Number of this plan in its table.
    pub epoch: i32,
    /// See [`PlanData::stream`].
    pub stream: i32,
    /// Bases come in this step.
    pub fit: bool,
    /// See [`PlanData::shared`].
    pub shared: bool,
    /// Bases exist before this step.
    pub fitted: bool,
    /// See [`PlanData::former`].
    pub former: bool,
    /// See [`PlanData::study`].
    pub study: Study,
    tokens: &'a [i32],
    exact: &'a [i32],
    tiles: &'a [i32],
    changes: Changes<'a>,
    records: &'a [i32],
    recents: &'a [i32],
    fit_rows: &'a [i32],
    fit_queries: &'a [i32],
}

/// A tile in use and its rows.
#[derive(Debug, Clone, Copy)]
pub struct TileView<'a> {
    /// The tile.
    pub tile: usize,
    rows: &'a [i32],
}

impl TileView<'_> {
    /// Cell of a row, or `None` for a dead row.
    pub fn cell(&self, row: usize) -> Option<usize> {
        usize::try_from(self.rows[2 * row]).ok()
    }
    /// Position difference that rotates a stored key to where it is now.
    pub fn turn(&self, row: usize) -> i32 {
        self.rows[2 * row + 1]
    }
    /// The first cell and the turn of a tile whose rows lie in consecutive cells and share a turn: nearly all do.
    pub fn run(&self) -> Option<(usize, i32)> {
        let (first, turn) = (self.rows[0], self.rows[1]);
        let other = self.rows.chunks_exact(2).zip(0..).fold(0, |other, (r, i)| other | (r[0].wrapping_sub(i) ^ first) | (r[1] ^ turn));
        (other == 0).then_some(()).and(usize::try_from(first).ok()).map(|cell| (cell, turn))
    }
    /// The turn of all rows that have a cell, if it is one.
    pub fn one_turn(&self) -> Option<i32> {
        let mut turns = self.rows.chunks_exact(2).filter(|r| r[0] >= 0).map(|r| r[1]);
        let first = turns.next()?;
        turns.all(|t| t == first).then_some(first)
    }
}

/// Changes to the tiles in transport form, one after another.
#[derive(Debug, Clone, Copy)]
pub struct Changes<'a>(&'a [i32]);

/// [`Filling`] in transport form.
#[derive(Debug, Clone, Copy)]
pub struct FillingView<'a>(&'a [i32]);

impl<'a> FillingView<'a> {
    /// The rows.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = SealRow> + 'a {
        self.0[..2 * TILE].chunks_exact(2).map(|r| SealRow { source: Source::from_int(r[0]), turn: r[1] })
    }
    /// The witnesses that are there.
    pub fn witnesses(&self) -> impl Iterator<Item = Source> + 'a {
        self.0[2 * TILE..].iter().filter(|i| **i != NOBODY).map(|i| Source::from_int(*i))
    }
}

impl Changes<'_> {
    fn are_whole(mut self) -> bool {
        self.by_ref().for_each(drop);
        self.0.is_empty()
    }
}

impl<'a> Iterator for Changes<'a> {
    type Item = Change<FillingView<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (change, tail) = self.0.split_at_checked(change_ints(self.0)?)?;
        self.0 = tail;
        let (from, to) = (change[1] as usize, change[2] as usize);
        Some(match change[0] {
            MOVE => Change::Move { from, to },
            RECODE => Change::Recode { from, to },
            _ => Change::Seal { tile: from, filling: FillingView(&change[2..]) },
        })
    }
}

/// Ints of the first change, or `None` when there is none that is known.
fn change_ints(changes: &[i32]) -> Option<usize> {
    match *changes.first()? {
        MOVE | RECODE => Some(MOVE_INTS),
        SEAL => Some(SEAL_INTS),
        _ => None,
    }
}

impl<'a> Plan<'a> {
    /// Check the header and cut the sections. Indices are checked by [`Plan::check`].
    pub fn parse(ints: &'a [i32]) -> Result<Self> {
        let bad = |m: &str| Err(Error::Data(format!("plan: {m}")));
        if ints.len() < HEADER || ints[0] != MAGIC {
            return bad("not a plan");
        }
        if ints[1] != VERSION {
            return bad("of another version");
        }
        let sizes = [2, 3, TILE_INTS, 1, 2, 2, FIT_ROW_INTS, FIT_QUERY_INTS];
        let mut rest = &ints[HEADER..];
        let mut parts: [&[i32]; 8] = [&[]; 8];
        for (i, size) in sizes.into_iter().enumerate() {
            let n = usize::try_from(ints[4 + i]).ok().and_then(|n| n.checked_mul(size));
            match n.and_then(|n| rest.split_at_checked(n)) {
                Some((part, tail)) => (parts[i], rest) = (part, tail),
                None => return bad("a section is longer than the plan"),
            }
        }
        let [tokens, exact, tiles, changes, records, recents, fit_rows, fit_queries] = parts;
        Ok(Plan {
            epoch: ints[2],
            stream: ints[16],
            fit: ints[3] & 1 != 0,
            shared: ints[3] & 4 != 0,
            fitted: ints[3] & 2 != 0,
            former: ints[3] & 8 != 0,
            study: Study { id: ints[13], from: ints[14], to: ints[15] },
            tokens,
            exact,
            tiles,
            changes: Changes(changes),
            records,
            recents,
            fit_rows,
            fit_queries,
        })
    }

    /// Check every slot, tile, row and token against a geometry, and the cells of rows outside of tiles. Those of tiles need none: one that does not exist
    /// is never visible.
    pub fn check(&self, g: &Geometry) -> Result<()> {
        let (tokens, all, cells) = (self.tokens().len(), g.tiles + g.waiting, g.config.n_cells as usize);
        let has_bases = self.fitted || self.fit;
        // Without bases only tiles of waiting rows can be filled.
        let fillable = |tile: usize| tile < all && (has_bases || tile >= g.tiles);
        let former = |number: usize, there: bool| there && (all..all + g.tiles).contains(&number);
        let source = |s: Source| match s {
            Source::Slot(s) => s < g.exact,
            Source::Token(t) => t < tokens,
            Source::Coded(row) => row < all * TILE && (self.fitted || row >= g.tiles * TILE),
        };
        let witness = |s: Source| match s {
            Source::Slot(s) => s < RECENT_QUERIES,
            Source::Token(t) => t < tokens,
            Source::Coded(_) => false,
        };
        // A fit that is not the first takes the place of other bases: all of it was prepared.
        let good = self.epoch != 0
            && (self.shared || !(self.fit && self.fitted))
            && (g.tiles > 0 || !has_bases)
            && (self.fitted && !self.fit && g.keeps_queries() || !self.former)
            && (0..=self.study.to).contains(&self.study.from)
            && (self.study.from == self.study.to || g.keeps_queries() && self.study.id > 0 && !self.fit)
            && self.tokens.chunks_exact(2).all(|t| t[1] >= -1 && t[1] < g.exact as i32)
            && self.tokens().all(|(cell, _)| cell < cells)
            && self.exact().all(|(slot, cell, _)| slot < g.exact && cell < cells)
            && self.tiles().all(|t| t.tile < all && (self.fitted || t.tile >= g.tiles) || former(t.tile, self.former))
            && self.changes.are_whole()
            && self.changes().all(|change| match change {
                Change::Move { from, to } => fillable(from / TILE) && fillable(to / TILE) && g.band_of(from / TILE) == g.band_of(to / TILE),
                Change::Recode { from, to } => {
                    let is_tile = fillable(from) || former(from, self.bases_to_store().1);
                    is_tile && to < g.tiles && has_bases && g.tile_of(from) != to
                }
                Change::Seal { tile, filling } => {
                    let is_row = |s: Source| source(s) && !matches!(s, Source::Coded(_));
                    fillable(tile) && filling.rows().all(|r| is_row(r.source)) && filling.witnesses().all(witness)
                }
            })
            && self.records().all(|(token, slot)| token < tokens && slot < QUERY_SLOTS)
            && self.recents().all(|(token, slot)| token < tokens && slot < RECENT_QUERIES)
            && self.fit_rows().all(|(r, ..)| source(r.source))
            && self.fit_queries().all(|(slot, ..)| slot < QUERY_SLOTS);
        if good {
            Ok(())
        } else {
            Err(Error::Data("plan: a slot, tile, row or token is out of range".into()))
        }
    }
    /// Whether a device can carry it out: fits and studies are the host's, as is what it tells of a study that is over.
    pub fn is_for_devices(&self) -> bool {
        !self.fit && self.study.id == 0 && self.study.from == self.study.to
    }
    /// Whether heads are studied in the step that fits, though all were before: its own rows are coded in it.
    pub fn studies_again(&self) -> bool {
        self.fit && self.shared && !self.fit_rows.is_empty()
    }
    /// Whether there are bases to store with, and others before them.
    pub fn bases_to_store(&self) -> (bool, bool) {
        (self.fitted || self.fit, self.former || self.fitted && self.fit)
    }
    /// Whether a head, counted as in [`Study`], is studied in this step.
    pub fn studies(&self, head: usize) -> bool {
        (self.study.from as usize..self.study.to as usize).contains(&head)
    }
    /// New tokens: `(cell, slot)`.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = (usize, Option<usize>)> + 'a {
        self.tokens.chunks_exact(2).map(|t| (t[0] as usize, usize::try_from(t[1]).ok()))
    }
    /// Live exact rows: `(slot, cell, turn)`.
    pub fn exact(&self) -> impl ExactSizeIterator<Item = (usize, usize, i32)> + 'a {
        self.exact.chunks_exact(3).map(|e| (e[0] as usize, e[1] as usize, e[2]))
    }
    /// Tiles in use.
    pub fn tiles(&self) -> impl ExactSizeIterator<Item = TileView<'a>> + 'a {
        self.tiles.chunks_exact(TILE_INTS).map(|t| TileView { tile: t[0] as usize, rows: &t[1..] })
    }
    /// What happens to the tiles, in order.
    pub fn changes(&self) -> Changes<'a> {
        self.changes
    }
    /// Tiles filled in this step.
    pub fn n_seals(&self) -> usize {
        self.changes().filter(|c| matches!(c, Change::Seal { .. })).count()
    }
    /// Queries to keep: `(token, query slot)`.
    pub fn records(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + 'a {
        self.records.chunks_exact(2).map(|m| (m[0] as usize, m[1] as usize))
    }
    /// Queries to keep as recent ones: `(token, slot)`.
    pub fn recents(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + 'a {
        self.recents.chunks_exact(2).map(|m| (m[0] as usize, m[1] as usize))
    }
    /// Rows to fit on: row, position, sequence.
    pub fn fit_rows(&self) -> impl ExactSizeIterator<Item = (SealRow, i32, i32)> + 'a {
        self.fit_rows.chunks_exact(FIT_ROW_INTS).map(|r| (SealRow { source: Source::from_int(r[0]), turn: r[1] }, r[2], r[3]))
    }
    /// Queries to fit on: slot, position, sequence.
    pub fn fit_queries(&self) -> impl ExactSizeIterator<Item = (usize, i32, i32)> + 'a {
        self.fit_queries.chunks_exact(FIT_QUERY_INTS).map(|q| (q[0] as usize, q[1], q[2]))
    }
}
