//! The host table of one stream: which cell's row is where, and what to do in the next step.
//!
//! A cell is llama.cpp's: an index with a position and sequences. The table learns what happened to cells (removed, shifted,
//! reused) by comparing, never by being told, so every sequence operation is exact without a hook of its own. New rows enter
//! exact slots or, when a ubatch is longer than the window, tiles directly. Rows that leave their sequence's window are sealed
//! 64 at a time into a tile of the finest band. A freed row is a hole; when a band runs out of tiles, rows of its sparse tiles
//! move, bit for bit, into holes of others; without enough holes its oldest tile is coded again in the next band. That happens while
//! the rows for a tile gather, one change in a step.
//! A table whose cells are all gone forgets its basis: what comes next gets the output it would get alone.
//!
//! Before there are bases, rows that leave the window wait in tiles of 8 bits per element. Plans say which heads to look at for the fit (a
//! study), in steps of few tokens a few at a time, in long ones all at once. The step after the last one writes the bases, and that one and
//! the next ones code what waited: a tile for every token, so that no more rows come meanwhile than a tile has. Where rows come faster than they can wait, the step that finds no
//! room looks and fits at once. With a calibration the first step with rows is the one that "fits": it has nothing to look at.
//!
//! The bases may fit what came first and not what comes later, and few rows make worse ones than many. Layers note how well the newest rows would be
//! coded; where that has become worse, or there is room for many more rows than the bases were fitted on, rows wait once more for another fit.
//! Then the tiles that there are, now in the former bases, are coded again, each into a free one: layers change their bases one after another, so
//! what a step empties is filled in a later one.
//!
//! A plan is pending until `commit`. Freeing the rows of vanished cells is a fact and is not rolled back; everything else is
//! applied by `commit`. Must not know what rows contain.

use super::findings::Findings;
use super::geometry::{Geometry, Kind, FORMER, WAITING};
use super::plan::{self, Change, Filling, PlanData, SealRow, Source, Study, FIT_ROWS_MAX, WITNESSES};
use crate::codec::anchor;
use crate::config::{BANDS, QUERY_SLOTS, RECENT_QUERIES, TILE};
use crate::error::{argument, Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::Arc;

/// Rows that come in while heads are looked at in steps of few tokens.
const FIT_LEAD: usize = 96;
/// Of recent tokens every one whose position is a multiple of this leaves its query.
const RECENT_STRIDE: i32 = 8;
/// How far behind the last row of a tile queries begin and end to tell which of its rows draw attention: nearer ones look at every neighbour.
const WITNESS_DISTANCE: std::ops::RangeInclusive<i32> = 32..=128;

const NOWHERE: u32 = u32::MAX;
const CODED: u32 = 1 << 31;

/// How many times worse than at the fit new rows would be coded before there is another one, however few they are.
const DRIFT: f64 = 2.0;
/// From so many observations of each head.
const DRIFT_SAMPLES: usize = 12;
/// How many new rows, for one that was fitted on, make another fit worth its while: what has been coded loses by being coded again.
const MORE_ROWS: f64 = 0.5;
/// The same where new rows would be coded somewhat worse than at the fit.
const SOME_MORE_ROWS: f64 = 0.25;
/// That is, so many times worse.
const SOME_DRIFT: f64 = 1.1;
/// Fewest tiles of rows that another fit looks at.
const REFIT_LEAST: usize = 4;

/// The next [`Study::id`] and [`PlanData::stream`]: layers know those of all tables of a process.
static NUMBERS: AtomicI32 = AtomicI32::new(1);

fn new_number() -> i32 {
    NUMBERS.fetch_add(1, Relaxed).max(1)
}

/// What the caller knows about the cells of a stream, after the new tokens were put into them.
#[derive(Debug, Clone, Copy)]
pub struct Cells<'a> {
    /// Position of each cell, -1 when empty.
    pub pos: &'a [i32],
    /// Lowest sequence that holds the cell, -1 when empty.
    pub seq: &'a [i32],
}

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// In an exact slot.
    Slot(usize),
    /// In a tile: tile, row.
    Coded(usize, usize),
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Table {
    geometry: Arc<Geometry>,
    findings: Arc<Findings>,
    /// See [`PlanData::stream`].
    stream: i32,
    location: Vec<u32>,
    row_cell: Vec<u32>,
    /// `turn - position` of a coded row: constant under shifts.
    row_turn: Vec<i32>,
    live: Vec<u64>,
    /// When the rows of a tile were sealed: counts tiles.
    sealed_at: Vec<u64>,
    sealed: u64,
    slot_cell: Vec<u32>,
    slot_pos: Vec<i32>,
    fitted: bool,
    /// Rows that the present bases were fitted on, without those after which they drifted.
    fitted_on: usize,
    /// Whether more rows would make better bases has been asked since.
    weighed: bool,
    /// Tiles in the former bases.
    former: Vec<bool>,
    /// Rows wait for another fit, in so many tiles at most; 0 when they do not.
    refit_room: usize,
    /// It is to come because the bases do not fit the newest rows.
    has_drifted: bool,
    epoch: i32,
    /// Position and sequence of the queries that are kept for a fit, and of recent ones.
    queries: Vec<Option<(i32, i32)>>,
    recent: Vec<Option<(i32, i32)>>,
    /// Tokens, and recent queries, so far.
    seen: u64,
    recorded: u64,
    /// The fit that is being prepared.
    study: Option<Looked>,
    /// A study that was given up and that layers have not been told of.
    given_up: i32,
    pending: Option<Pending>,
}

/// How far a study has come.
#[derive(Debug, Clone, Copy)]
struct Looked {
    id: i32,
    /// Heads that were looked at, counted over all layers.
    heads: usize,
    /// Rows that they were looked at with.
    rows: usize,
}

#[derive(Debug, Clone)]
struct Pending {
    data: PlanData,
    /// [`Table::study`] after it.
    study: Option<Looked>,
    /// Position and sequence of every new token.
    token_places: Vec<(i32, i32)>,
    /// In the order of the tiles that are filled: when their rows were sealed, and of each its cell and its `turn - position`.
    sealed: Vec<(u64, [(u32, i32); TILE])>,
}

/// Where the rows of a saved state go; per-cell vectors are in the order of the cells given.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Bases exist afterwards.
    pub fitted: bool,
    /// The stream takes over the state's bases.
    pub adopt: bool,
    /// The stream takes over what the state's waiting rows are coded relative to.
    pub adopt_plain: bool,
    /// The stream held nothing before.
    pub was_empty: bool,
    /// Exact slot of each cell, or `None` when it is coded.
    pub slots: Vec<Option<u32>>,
    /// Tile row of each coded cell, in the saved band where that has room. Without bases these are rows that wait.
    pub rows: Vec<u32>,
    /// Turn into its tile's frame of each exact row that has to be coded.
    pub turns: Vec<i32>,
    row_turns: Vec<i32>,
    places: Vec<(i32, i32)>,
}

#[derive(Clone, Copy)]
struct Candidate {
    seq: i32,
    pos: i32,
    cell: u32,
    source: Source,
    stored_turn: i32,
}

impl Candidate {
    fn token(&self) -> Option<usize> {
        match self.source {
            Source::Token(token) => Some(token),
            _ => None,
        }
    }
}

/// The rows of a sequence, without sinks, that are behind its window: tile by tile.
fn groups(rest: &[Candidate], window: usize) -> impl Iterator<Item = &[Candidate]> {
    rest.chunks_exact(TILE).take(rest.len().saturating_sub(window) / TILE)
}

/// The anchor of each row of a tile: that of the middle of its run of near positions. A row far from its anchor would lie
/// outside the frames the basis was fitted in; each further anchor costs attention one more projection.
fn anchors(group: &[Candidate]) -> Vec<i32> {
    let near = |a: &Candidate, b: &Candidate| b.pos - a.pos <= TILE as i32;
    group.chunk_by(near).flat_map(|run| std::iter::repeat_n(anchor(run[run.len() / 2].pos), run.len())).collect()
}

impl Table {
    /// An empty table.
    pub fn new(geometry: Arc<Geometry>, findings: Arc<Findings>) -> Self {
        let g = &geometry;
        Table {
            findings,
            stream: new_number(),
            location: vec![NOWHERE; g.config.n_cells as usize],
            row_cell: vec![NOWHERE; (g.tiles + g.waiting) * TILE],
            row_turn: vec![0; (g.tiles + g.waiting) * TILE],
            live: vec![0; g.tiles + g.waiting],
            sealed_at: vec![0; g.tiles + g.waiting],
            sealed: 0,
            slot_cell: vec![NOWHERE; g.exact],
            slot_pos: vec![0; g.exact],
            fitted: false,
            fitted_on: 0,
            weighed: false,
            former: vec![false; g.tiles],
            refit_room: 0,
            has_drifted: false,
            epoch: 0,
            queries: vec![None; QUERY_SLOTS],
            recent: vec![None; RECENT_QUERIES],
            seen: 0,
            recorded: 0,
            study: None,
            given_up: 0,
            pending: None,
            geometry,
        }
    }

    /// A copy for another arena: what layers know of this one's rows stays with it.
    pub fn copied(&self) -> Self {
        let pending = self.pending.clone().map(|p| Pending { study: None, ..p });
        Table { stream: new_number(), study: None, refit_room: 0, given_up: 0, pending, ..self.clone() }
    }

    /// The geometry this table belongs to.
    pub fn geometry(&self) -> &Arc<Geometry> {
        &self.geometry
    }

    /// Forget everything.
    pub fn reset(&mut self) {
        self.give_up();
        // Epochs go on, so that an arena never takes a new plan for one it has seen.
        let epoch = self.pending.as_ref().map_or(self.epoch, |p| p.data.epoch);
        self.findings.forget_drift(self.stream);
        *self = Table { epoch, given_up: self.given_up, ..Table::new(self.geometry.clone(), self.findings.clone()) };
    }

    /// Bases exist.
    pub fn is_fitted(&self) -> bool {
        self.fitted
    }

    /// A plan waits for its commit.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// The number under which plans speak of a tile.
    pub fn number(&self, tile: usize) -> usize {
        if self.is_former(tile) {
            self.geometry.former(tile)
        } else {
            tile
        }
    }

    /// Where a cell's row is, and its turn less its position; `None` when there is none.
    pub fn locate(&self, cell: usize) -> Option<(Location, i32)> {
        match *self.location.get(cell)? {
            NOWHERE => None,
            l if l & CODED == 0 => Some((Location::Slot(l as usize), self.slot_pos[l as usize].wrapping_neg())),
            l => {
                let row = (l & !CODED) as usize;
                Some((Location::Coded(row / TILE, row % TILE), self.row_turn[row]))
            }
        }
    }

    /// The fit is no longer being prepared.
    fn give_up(&mut self) {
        if let Some(study) = self.study.take() {
            self.given_up = study.id;
        }
    }

    /// A tile without rows is in no bases.
    fn leave_former(&mut self, tile: usize) {
        if self.live[tile] == 0 && tile < self.former.len() {
            self.former[tile] = false;
        }
    }

    fn free(&mut self, cell: usize) {
        match self.locate(cell) {
            Some((Location::Slot(slot), _)) => self.slot_cell[slot] = NOWHERE,
            Some((Location::Coded(tile, row), _)) => {
                self.row_cell[tile * TILE + row] = NOWHERE;
                self.live[tile] &= !(1 << row);
                self.leave_former(tile);
            }
            None => {}
        }
        self.location[cell] = NOWHERE;
    }

    fn check_cells(&self, cells: &Cells, new: &[u32]) -> Result<()> {
        let n_cells = self.location.len();
        if cells.pos.len() != n_cells || cells.seq.len() != n_cells {
            return argument(format!("{} positions and {} sequences for {n_cells} cells", cells.pos.len(), cells.seq.len()));
        }
        if cells.pos.iter().zip(cells.seq).any(|(p, s)| (*p < 0) != (*s < 0)) {
            return argument("a cell has a position but no sequence, or the other way round");
        }
        let mut sorted = new.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).any(|w| w[0] == w[1]) {
            return argument("a cell appears twice among the new ones");
        }
        match sorted.iter().find(|c| **c as usize >= n_cells || cells.pos[**c as usize] < 0) {
            Some(c) => argument(format!("new row in cell {c}, which is empty or not among the {n_cells} cells")),
            None => Ok(()),
        }
    }

    /// Bring the table up to date with the cells, before `new` ones get new rows.
    fn reconcile(&mut self, cells: &Cells, new: &[u32]) {
        for cell in 0..self.location.len() {
            if cells.pos[cell] < 0 && self.location[cell] != NOWHERE {
                self.free(cell);
            }
        }
        for cell in new {
            self.free(*cell as usize);
        }
        if self.location.iter().all(|l| *l == NOWHERE) {
            (self.fitted, self.fitted_on, self.refit_room) = (false, 0, 0);
            self.former.fill(false);
            self.findings.forget_drift(self.stream);
            self.queries.fill(None);
            self.recent.fill(None);
            (self.seen, self.recorded) = (0, 0);
            self.give_up();
        }
    }

    /// Plan one step: the new tokens go to the cells `new`, in order. Writes the plan to `out` and returns its length.
    pub fn plan(&mut self, cells: Cells, new: &[u32], out: &mut [i32]) -> Result<usize> {
        self.check_cells(&cells, new)?;
        if new.len() > self.geometry.config.n_tokens as usize && self.geometry.tiles > 0 {
            return argument(format!("a step of {} tokens; the cache was made for {} at most", new.len(), self.geometry.config.n_tokens));
        }
        let need = plan::capacity(&self.geometry, new.len());
        if out.len() < need {
            return Err(Error::Buffer { need, have: out.len() });
        }
        self.pending = None;
        self.reconcile(&cells, new);
        self.watch();
        let data = PlanData {
            epoch: self.epoch.wrapping_add(1).max(1),
            stream: self.stream,
            fitted: self.fitted,
            former: self.former_tiles().next().is_some(),
            exact: self
                .slot_cell
                .iter()
                .enumerate()
                .filter(|(_, c)| **c != NOWHERE)
                .map(|(s, c)| (s as u32, *c, cells.pos[*c as usize].wrapping_sub(self.slot_pos[s])))
                .collect(),
            ..PlanData::default()
        };
        let pending = self.place(data, &cells, new)?;
        let (former, own): (Vec<usize>, Vec<usize>) = (0..self.live.len()).filter(|t| self.live[*t] != 0).partition(|t| self.is_former(*t));
        let tiles = own.into_iter().chain(former).map(|tile| {
            let mut rows = [(-1, 0); TILE];
            for (row, out) in rows.iter_mut().enumerate() {
                let cell = self.row_cell[tile * TILE + row];
                if cell != NOWHERE {
                    *out = (cell as i32, self.row_turn[tile * TILE + row].wrapping_add(cells.pos[cell as usize]));
                }
            }
            (self.number(tile) as u32, rows)
        });
        let used = pending.data.write(tiles, out)?;
        self.pending = Some(pending);
        Ok(used)
    }

    fn is_former(&self, tile: usize) -> bool {
        self.former.get(tile).is_some_and(|f| *f)
    }

    /// Tiles with rows in the former bases.
    fn former_tiles(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.former.len()).filter(|t| self.former[*t])
    }

    /// Begin to gather rows for another fit if the bases no longer fit what comes, or were fitted on few rows, and there is room to code everything again.
    fn watch(&mut self) {
        let g = &self.geometry;
        if !self.fitted
            || !g.keeps_queries()
            || self.refit_room > 0
            || self.former_tiles().next().is_some()
            || self.live[g.tiles..].iter().any(|l| *l != 0)
        {
            return;
        }
        let drifts = self.findings.drift(self.stream).filter(|(_, n)| *n >= DRIFT_SAMPLES * g.n_heads());
        let first_time = !std::mem::replace(&mut self.weighed, true);
        if drifts.is_none() && !first_time {
            return;
        }
        let (drift, room) = (drifts.map_or(0.0, |(drift, _)| drift), self.room_for_refit());
        if drifts.is_some() {
            self.findings.forget_drift(self.stream);
        }
        let needed = match drift {
            d if d > DRIFT => 0.0,
            d if d > SOME_DRIFT => SOME_MORE_ROWS,
            _ => MORE_ROWS,
        };
        let new_rows = (room * TILE + self.geometry.config.window as usize) as f64;
        if drift > DRIFT || self.fitted_on < FIT_ROWS_MAX && new_rows >= needed * self.fitted_on as f64 {
            (self.refit_room, self.has_drifted) = (room, drift > DRIFT);
            self.seen = 0;
            self.queries.fill(None);
        }
    }

    /// In how many tiles rows may wait so that afterwards all tiles can be coded again; 0 when that is too few.
    fn room_for_refit(&self) -> usize {
        let (g, first) = (&self.geometry, self.geometry.waiting_in_former());
        let (used, last) = (self.live.iter().filter(|l| **l != 0).count(), self.live.iter().rposition(|l| *l != 0).unwrap_or(0));
        let fits = |n: &usize| last < g.tiles_beside(first + n) && g.can_code_all(used, used, first..first + n);
        (REFIT_LEAST..=g.waiting.saturating_sub(first)).rev().find(fits).unwrap_or(0)
    }

    /// Rows wait, for the first fit or another.
    fn waits(&self) -> bool {
        !self.fitted || self.refit_room > 0
    }

    /// Decide where the new rows go, what is sealed, moved and fitted.
    fn place(&self, mut data: PlanData, cells: &Cells, new: &[u32]) -> Result<Pending> {
        let candidates = self.candidates(&data, cells, new);
        let sequences: Vec<&[Candidate]> = candidates.chunk_by(|a, b| a.seq == b.seq).collect();
        let rests: Vec<&[Candidate]> = sequences.iter().map(|s| &s[self.sinks(s)..]).collect();
        let window = self.geometry.config.window as usize;
        let leaving: Vec<&[Candidate]> = if self.geometry.tiles > 0 { rests.iter().flat_map(|r| groups(r, window)).collect() } else { vec![] };

        let mut tiles = Tiles::new(self);
        let mut study = self.prepare_fit(&mut data, &tiles, cells, new, leaving.len());
        // Rows of a long step that are coded in it have not been looked at: their heads are, once more.
        let looks_again = data.fit && data.shared && !self.fitted && self.geometry.keeps_queries() && new.len() > window;
        self.record(&mut data, cells, new, looks_again);
        if data.fit && !data.shared || data.study.from < data.study.to || looks_again {
            let rows = self.fit_on(&mut data, cells, &sequences, new);
            study.iter_mut().for_each(|study| study.rows = rows);
        }
        if !new.is_empty() && data.study.id == 0 {
            data.study.id = -self.given_up;
        }

        let fill = |group: &[Candidate]| {
            let witnesses = self.witnesses(group, &rests);
            let anchors = anchors(group);
            let rows = std::array::from_fn(|i| SealRow { source: group[i].source, turn: group[i].stored_turn.wrapping_sub(anchors[i]) });
            let places = std::array::from_fn(|i| (group[i].cell, anchors[i].wrapping_sub(group[i].pos)));
            (Filling { rows, witnesses }, places)
        };
        if !new.is_empty() && self.geometry.tiles > 0 {
            if !data.fit && self.waits() && leaving.len() <= tiles.room_to_wait() {
                leaving.iter().try_for_each(|group| tiles.wait(fill(group)))?;
            } else if data.fit || tiles.are_to_be_coded() {
                if data.fit {
                    tiles.outdate();
                }
                tiles.code_again(leaving.iter().map(|group| fill(group)).collect(), new.len())?;
            } else {
                let most = rests.iter().map(|rest| rest.len().saturating_sub(window)).max().unwrap_or(0);
                if most < TILE {
                    tiles.prepare(most);
                }
                leaving.iter().try_for_each(|group| tiles.seal(fill(group)))?;
            }
        }
        let mut leaves = vec![false; new.len()];
        let sealed_tokens = tiles.changes.iter().filter_map(|c| if let Change::Seal { filling, .. } = c { Some(filling) } else { None });
        sealed_tokens.flat_map(|f| &f.rows).for_each(|r| {
            if let Source::Token(t) = r.source {
                leaves[t] = true
            }
        });
        data.changes = tiles.changes;
        self.slots(&mut data, new, &leaves)?;
        let token_places = new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect();
        Ok(Pending { data, study, token_places, sealed: tiles.sealed_rows })
    }

    /// The exact rows and the new ones, by sequence and position.
    fn candidates(&self, data: &PlanData, cells: &Cells, new: &[u32]) -> Vec<Candidate> {
        let at = |cell: u32| (cells.seq[cell as usize], cells.pos[cell as usize]);
        let mut candidates: Vec<Candidate> = Vec::with_capacity(data.exact.len() + new.len());
        for (slot, cell, turn) in &data.exact {
            let (seq, pos) = at(*cell);
            candidates.push(Candidate { seq, pos, cell: *cell, source: Source::Slot(*slot as usize), stored_turn: *turn });
        }
        for (i, cell) in new.iter().enumerate() {
            let (seq, pos) = at(*cell);
            candidates.push(Candidate { seq, pos, cell: *cell, source: Source::Token(i), stored_turn: 0 });
        }
        candidates.sort_unstable_by_key(|c| (c.seq, c.pos, c.cell));
        candidates
    }

    /// How many of a sequence's rows are sinks.
    fn sinks(&self, rows: &[Candidate]) -> usize {
        let sinks = self.geometry.config.sinks;
        rows.iter().take(sinks as usize).take_while(|c| c.pos < sinks as i32).count()
    }

    /// Whether this step fits, and which heads it looks at for a fit to come. Gives the study after it.
    fn prepare_fit(&self, data: &mut PlanData, tiles: &Tiles, cells: &Cells, new: &[u32], leaving: usize) -> Option<Looked> {
        let g = &self.geometry;
        if !self.waits() || g.tiles == 0 || new.is_empty() {
            return self.study;
        }
        let room = tiles.room_to_wait();
        data.shared = g.config.calibrated || self.study.is_some_and(|s| s.heads == g.n_heads());
        if self.fitted && !data.shared && leaving > room {
            // Rows come faster than they can wait for another fit: the present bases have to do.
            return None;
        }
        data.fit = data.shared || leaving > room;
        let study = if data.fit { self.study } else { self.next_study(room - leaving, cells, new).or(self.study) };
        let looked = self.study.map_or(0, |s| s.heads);
        if let Some(s) = study {
            data.study = Study { id: s.id, from: looked as i32, to: s.heads as i32 };
        }
        if data.fit {
            return None;
        }
        study
    }

    /// The study with what this step looks at, if it is time for that: with `room` tiles left for rows to wait in.
    fn next_study(&self, room: usize, cells: &Cells, new: &[u32]) -> Option<Looked> {
        let g = &self.geometry;
        let (mut rows, mut growth) = (BTreeMap::<i32, usize>::new(), BTreeMap::<i32, usize>::new());
        // For another fit only rows count that came since: they wait or are exact.
        let is_old = |cell: usize| {
            self.location[cell] != NOWHERE && self.location[cell] & CODED != 0 && self.location[cell] & !CODED < (g.tiles * TILE) as u32
        };
        let counted = cells.seq.iter().enumerate().filter(|(cell, s)| **s >= 0 && !(self.fitted && is_old(*cell)));
        counted.for_each(|(_, s)| *rows.entry(*s).or_default() += 1);
        new.iter().for_each(|c| *growth.entry(cells.seq[*c as usize]).or_default() += 1);
        // Steps like this one until a sequence has enough rows, or there is no room for more.
        let until = |(seq, growth): (&i32, &usize)| g.fit_rows.saturating_sub(rows[seq]) / growth;
        let steps = growth.iter().map(until).min().unwrap_or(0).min(room * TILE / new.len());
        let study = match self.study {
            Some(study) => study,
            None if steps > (FIT_LEAD / new.len()).min(g.n_heads()) => return None,
            None => Looked { id: new_number(), heads: 0, rows: 0 },
        };
        let left = g.n_heads() - study.heads;
        Some(Looked { heads: study.heads + left.div_ceil(steps + 1), ..study })
    }

    /// Which tokens leave their queries behind, for a fit and as recent ones.
    fn record(&self, data: &mut PlanData, cells: &Cells, new: &[u32], looks_again: bool) {
        let g = &self.geometry;
        if g.keeps_queries() && self.waits() && (looks_again || !(data.fit && data.shared)) {
            let rows = if self.fitted { self.refit_room * TILE + g.config.window as usize } else { g.fit_rows };
            let stride = (rows.min(g.fit_rows) / QUERY_SLOTS).max(1) as u64;
            let at = |i: usize| self.seen + i as u64;
            let kept = (0..new.len()).filter(|i| at(*i).is_multiple_of(stride));
            data.records = kept.map(|i| (i as u32, (at(i) / stride % QUERY_SLOTS as u64) as u32)).collect();
            // Slots that are written twice in a step keep the later one.
            let surplus = data.records.len().saturating_sub(QUERY_SLOTS);
            data.records.drain(..surplus);
        }
        if g.tiles > 0 {
            let recent: Vec<usize> = (0..new.len()).filter(|i| cells.pos[new[*i] as usize] % RECENT_STRIDE == 0).collect();
            let kept = &recent[recent.len().saturating_sub(RECENT_QUERIES)..];
            let slot = |i: usize| ((self.recorded + i as u64) % RECENT_QUERIES as u64) as u32;
            data.recents = kept.iter().enumerate().map(|(i, token)| (*token as u32, slot(i))).collect();
        }
    }

    /// Queries that came some time after the rows of a tile: of the step's own tokens, and recent ones.
    fn witnesses(&self, group: &[Candidate], rests: &[&[Candidate]]) -> [Option<Source>; WITNESSES] {
        let last = group[group.len() - 1];
        let is_witness = |pos: i32| WITNESS_DISTANCE.contains(&pos.wrapping_sub(last.pos));
        let recent = self.recent.iter().enumerate().filter_map(|(slot, place)| {
            let (pos, seq) = (*place)?;
            (seq == last.seq && is_witness(pos)).then_some(Source::Slot(slot))
        });
        let own = rests.iter().filter(|r| r.first().is_some_and(|c| c.seq == last.seq)).flat_map(|r| r.iter());
        let own = own.filter(|c| c.token().is_some() && is_witness(c.pos) && c.pos % RECENT_STRIDE == 0).map(|c| c.source);
        let mut all = recent.chain(own);
        std::array::from_fn(|_| all.next())
    }

    /// Give slots to the tokens that stay exact.
    fn slots(&self, data: &mut PlanData, new: &[u32], leaves: &[bool]) -> Result<()> {
        let mut taken: Vec<bool> = self.slot_cell.iter().map(|c| *c != NOWHERE).collect();
        for change in &data.changes {
            let Change::Seal { filling, .. } = change else { continue };
            filling.rows.iter().for_each(|r| {
                if let Source::Slot(slot) = r.source {
                    taken[slot] = false
                }
            });
        }
        let mut free = (0..taken.len()).filter(|slot| !taken[*slot]);
        for (cell, leaves) in new.iter().zip(leaves) {
            let slot = if *leaves { None } else { Some(free.next().ok_or_else(|| self.no_slot())?) };
            data.tokens.push((*cell, slot.map_or(-1, |s| s as i32)));
        }
        Ok(())
    }

    fn no_slot(&self) -> Error {
        Error::Full(format!("all {} exact slots are taken by {} sequences", self.slot_cell.len(), self.geometry.config.n_seqs))
    }

    /// The rows and queries that there are to fit on. Gives how many rows say something about those to come.
    fn fit_on(&self, data: &mut PlanData, cells: &Cells, sequences: &[&[Candidate]], new: &[u32]) -> usize {
        let g = &self.geometry;
        // As many old tiles, which other bases coded, as there is room for: rows that are all alike make the same error, which no mean takes away.
        let (old, waiting): (Vec<usize>, Vec<usize>) = (0..self.live.len()).filter(|t| self.live[*t] != 0).partition(|t| *t < g.tiles);
        let own = waiting.len() * TILE + sequences.iter().map(|s| s.len()).sum::<usize>();
        let every = old.len().div_ceil((FIT_ROWS_MAX.saturating_sub(own) / TILE).max(1)).max(1);
        for tile in old.into_iter().step_by(every).chain(waiting) {
            for row in (tile * TILE..(tile + 1) * TILE).filter(|row| self.row_cell[*row] != NOWHERE) {
                let cell = self.row_cell[row] as usize;
                let (pos, seq) = (cells.pos[cell], cells.seq[cell]);
                data.fit_rows.push((SealRow { source: Source::Coded(row), turn: self.row_turn[row].wrapping_add(pos) }, pos, seq));
            }
        }
        // Sinks are not fitted on, but queries look at them.
        let groups = sequences.iter().flat_map(|s| std::iter::once(&s[..self.sinks(s)]).chain(s[self.sinks(s)..].chunks(TILE)));
        for group in groups.filter(|group| !group.is_empty()) {
            for (c, anchor) in group.iter().zip(anchors(group)) {
                let turn = c.stored_turn.wrapping_sub(anchor);
                data.fit_rows.push((SealRow { source: c.source, turn }, c.pos, c.seq));
            }
        }
        data.fit_rows.truncate(FIT_ROWS_MAX);
        let mut queries = self.queries.clone();
        for (token, slot) in &data.records {
            let cell = new[*token as usize] as usize;
            queries[*slot as usize] = Some((cells.pos[cell], cells.seq[cell]));
        }
        data.fit_queries = queries.iter().enumerate().filter_map(|(i, q)| q.map(|(pos, seq)| (i as u32, pos, seq))).collect();
        if self.has_drifted {
            own
        } else {
            data.fit_rows.len()
        }
    }

    /// The graph of the pending plan ran to its end: the plan becomes fact.
    pub fn commit(&mut self) -> Result<()> {
        self.finish(true)
    }

    /// The graph of the pending plan failed and every layer replayed it: take over all but the new tokens. When that plan was
    /// to fit and few rows were stored before it, there is nothing to fit on and the waiting rows may be gone: the table forgets
    /// all rows and says so.
    pub fn commit_replayed(&mut self) -> Result<()> {
        let too_few = |p: &Pending| plan::replay_is_lost(&self.geometry, p.data.shared, p.data.fit_rows.iter().map(|r| r.0.source));
        let lost = self.pending.as_ref().is_some_and(|p| p.data.fit && too_few(p));
        if lost && self.slot_cell.iter().any(|c| *c != NOWHERE) {
            self.reset();
            return Err(Error::State("the step that fits the bases was interrupted with few rows stored; clear the cache and begin again".into()));
        }
        if lost {
            self.reset();
            return Ok(());
        }
        self.finish(false)
    }

    fn finish(&mut self, with_tokens: bool) -> Result<()> {
        let Some(p) = self.pending.take() else {
            return Err(Error::State("no plan is pending".into()));
        };
        self.epoch = p.data.epoch;
        if p.data.fit {
            // Nobody needs any longer what was found.
            self.former = self.live[..self.former.len()].iter().map(|l| self.fitted && *l != 0).collect();
            (self.fitted, self.refit_room, self.given_up) = (true, 0, p.data.study.id.max(0));
            self.fitted_on = self.study.map_or(p.data.fit_rows.len(), |s| s.rows);
            self.weighed = false;
            self.findings.forget_drift(self.stream);
        }
        if with_tokens || p.data.fit {
            // What was begun and is not gone on with is over.
            if p.study.is_none() && !p.data.fit && self.study.is_some() {
                self.give_up();
                self.refit_room = 0;
            }
            self.study = p.study;
        }
        let mut sealed = p.sealed.iter();
        for change in &p.data.changes {
            match change {
                Change::Move { from, to } => self.move_coded(*from, *to),
                Change::Recode { from, to } => {
                    let from = self.geometry.tile_of(*from);
                    (0..TILE).for_each(|row| self.move_coded(from * TILE + row, to * TILE + row));
                    self.sealed_at[*to] = self.sealed_at[from];
                    self.leave_former(from);
                }
                Change::Seal { tile, filling } => {
                    let (age, places) = sealed.next().expect("invariant: a place for every sealed row");
                    self.sealed = self.sealed.max(*age);
                    self.sealed_at[*tile] = *age;
                    for (row, (r, (cell, turn))) in filling.rows.iter().zip(places).enumerate() {
                        match r.source {
                            Source::Slot(s) => self.slot_cell[s] = NOWHERE,
                            _ if !with_tokens => continue,
                            _ => {}
                        }
                        self.put_coded(*cell, *tile * TILE + row, *turn);
                    }
                }
            }
        }
        if with_tokens {
            for ((cell, slot), (pos, _)) in p.data.tokens.iter().zip(&p.token_places) {
                if let Ok(slot) = usize::try_from(*slot) {
                    self.put_exact(*cell, slot, *pos);
                }
            }
            if p.data.study.id == -self.given_up {
                self.given_up = 0;
            }
            for (token, slot) in &p.data.records {
                self.queries[*slot as usize] = Some(p.token_places[*token as usize]);
            }
            for (token, slot) in &p.data.recents {
                self.recent[*slot as usize] = Some(p.token_places[*token as usize]);
            }
            self.recorded += p.data.recents.len() as u64;
        }
        if !self.waits() {
            self.queries.fill(None);
            self.seen = 0;
        } else if with_tokens {
            self.seen += p.data.tokens.len() as u64;
        }
        Ok(())
    }

    /// Dead rows stay where they are.
    fn move_coded(&mut self, from: usize, to: usize) {
        let cell = std::mem::replace(&mut self.row_cell[from], NOWHERE);
        if cell != NOWHERE {
            self.live[from / TILE] &= !(1 << (from % TILE));
            self.put_coded(cell, to, self.row_turn[from]);
        }
    }

    fn put_coded(&mut self, cell: u32, row: usize, turn: i32) {
        self.row_cell[row] = cell;
        self.row_turn[row] = turn;
        self.live[row / TILE] |= 1 << (row % TILE);
        self.location[cell as usize] = CODED | row as u32;
    }

    fn put_exact(&mut self, cell: u32, slot: usize, pos: i32) {
        self.slot_cell[slot] = cell;
        self.slot_pos[slot] = pos;
        self.location[cell as usize] = slot as u32;
    }

    /// Where the rows of a saved state go. `coded` (the kind, `None` when exact) and `turns` (less position) are the
    /// state's; see [`crate::state`].
    pub fn plan_restore(&mut self, cells: Cells, new: &[u32], coded: &[Option<Kind>], turns: &[i32], saved_fitted: bool) -> Result<Restore> {
        self.check_cells(&cells, new)?;
        self.pending = None;
        self.reconcile(&cells, new);
        let g = self.geometry.clone();
        let was_empty = self.location.iter().all(|l| *l == NOWHERE);
        let fitted = self.fitted || saved_fitted;
        let waited = self.live[g.tiles..].iter().rposition(|l| *l != 0).map_or(0, |last| last + 1);
        let mut r = Restore {
            fitted,
            adopt: saved_fitted && !self.fitted,
            adopt_plain: waited == 0,
            was_empty,
            slots: vec![None; new.len()],
            rows: vec![NOWHERE; new.len()],
            turns: vec![0; new.len()],
            row_turns: turns.to_vec(),
            places: new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect(),
        };
        let mut free: Vec<u32> = (0..g.exact).rev().filter(|s| self.slot_cell[*s] == NOWHERE).map(|s| s as u32).collect();
        // Sinks and the newest rows first: what finds no slot is coded.
        let mut exact: Vec<usize> = (0..new.len()).filter(|i| coded[*i].is_none()).collect();
        exact.sort_by_key(|i| (r.places[*i].0 >= g.config.sinks as i32, std::cmp::Reverse(r.places[*i].0)));
        for i in exact {
            r.slots[i] = free.pop();
            if r.slots[i].is_some() {
                continue;
            }
            let pos = r.places[i].0;
            let anchor = anchor(pos);
            r.turns[i] = turns[i].wrapping_add(pos).wrapping_sub(anchor);
            r.row_turns[i] = anchor.wrapping_sub(pos);
        }
        let former = self.former_tiles().count();
        let beyond = if former > 0 { waited.max(g.waiting_in_former()) } else { waited };
        let limit = if beyond > 0 { g.tiles_beside(beyond) } else { g.tiles };
        let mut is_open: Vec<bool> = (0..self.live.len()).map(|t| (t < limit || t >= g.tiles) && !self.is_former(t)).collect();
        if former > 0 {
            // What is to be coded again needs free tiles to go to.
            let least = (0..limit).rev().find(|used| g.can_code_all(*used, former, 0..waited)).unwrap_or(0);
            (0..limit).rev().filter(|t| self.live[*t] == 0).take(limit - least).for_each(|t| is_open[t] = false);
        }
        let mut holes: [_; BANDS + 1] = std::array::from_fn(|band| {
            let tiles = g.band(band).filter(|t| is_open[*t]);
            let (whole, partial): (Vec<usize>, Vec<usize>) = tiles.partition(|t| self.live[*t] == 0);
            let live = &self.live;
            whole.into_iter().chain(partial).flat_map(|t| (0..TILE).map(move |row| (t, row))).filter(|(t, row)| live[*t] >> row & 1 == 0)
        });
        for i in (0..new.len()).filter(|i| r.slots[*i].is_none()) {
            // Rows that were exact or waited are young. What a band has no room for is coded again, coarser if possible.
            let band = coded[i].filter(|kind| *kind != WAITING).map_or(0, |kind| kind % FORMER);
            let mut bands = if fitted { (band..BANDS).chain((0..band).rev()) } else { (BANDS..BANDS + 1).chain((0..0).rev()) };
            let (tile, row) = bands.find_map(|b| holes[b].next()).ok_or_else(|| Error::Full("no tile row is free for the saved rows".into()))?;
            r.rows[i] = (tile * TILE + row) as u32;
        }
        Ok(r)
    }

    /// The rows of a state are in their places.
    pub fn commit_restore(&mut self, r: &Restore, new: &[u32]) {
        (self.fitted, self.refit_room) = (r.fitted, 0);
        self.findings.forget_drift(self.stream);
        self.give_up();
        for (i, cell) in new.iter().enumerate() {
            match r.slots[i] {
                Some(slot) => self.put_exact(*cell, slot as usize, r.row_turns[i].wrapping_neg()),
                None => {
                    let tile = r.rows[i] as usize / TILE;
                    if self.live[tile] == 0 {
                        self.sealed += 1;
                        self.sealed_at[tile] = self.sealed;
                    }
                    self.put_coded(*cell, r.rows[i] as usize, r.row_turns[i]);
                }
            }
        }
    }

    /// The places of the queries that are kept, for a fit and as recent ones, how many there were, and what the bases were fitted on.
    pub fn queries_to_bytes(&self) -> Vec<u8> {
        let counts = [self.seen, self.recorded, self.fitted_on as u64].map(u64::to_le_bytes).into_iter().flatten();
        let places = self.queries.iter().chain(&self.recent).map(|q| q.unwrap_or((-1, -1)));
        counts.chain(places.flat_map(|(pos, seq)| [pos.to_le_bytes(), seq.to_le_bytes()]).flatten()).collect()
    }

    /// Take over what [`Table::queries_to_bytes`] gave, as queries of `seq` if one is given.
    pub fn queries_from_bytes(&mut self, bytes: &[u8], as_seq: Option<i32>) -> Result<()> {
        let Some((counts, places)) = bytes.split_first_chunk::<24>().filter(|(_, p)| p.len() == 8 * (QUERY_SLOTS + RECENT_QUERIES)) else {
            return Err(Error::Data("state: the list of queries has another length".into()));
        };
        let long = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("invariant: eight bytes"));
        (self.seen, self.recorded, self.fitted_on) = (long(&counts[..8]), long(&counts[8..16]), long(&counts[16..]) as usize);
        let int = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
        for (q, p) in self.queries.iter_mut().chain(&mut self.recent).zip(places.chunks_exact(8)) {
            let (pos, seq) = (int(&p[..4]), int(&p[4..]));
            *q = (pos >= 0).then_some((pos, as_seq.unwrap_or(seq)));
        }
        Ok(())
    }
}

/// What a tile is filled with, and the cell and the `turn - position` of each row.
type Fill = (Filling, [(u32, i32); TILE]);

/// The tiles as they will be: makes room in bands, and notes what that takes.
struct Tiles<'a> {
    geometry: &'a Geometry,
    live: Vec<u64>,
    sealed_at: Vec<u64>,
    sealed: u64,
    changes: Vec<Change<Filling>>,
    /// See [`Pending::sealed`].
    sealed_rows: Vec<(u64, [(u32, i32); TILE])>,
    /// In which tiles rows may wait.
    waiting: Range<usize>,
    /// Tiles of waiting rows up to the last one in use at the beginning of the step: layers are coded one after another.
    waited: usize,
    /// Tiles whose rows were in the former bases at the beginning of the step.
    former: Vec<bool>,
}

impl<'a> Tiles<'a> {
    fn new(table: &'a Table) -> Self {
        let (live, sealed_at) = (table.live.clone(), table.sealed_at.clone());
        let waited = live[table.geometry.tiles..].iter().rposition(|l| *l != 0).map_or(0, |last| last + 1);
        let mut waiting = table.geometry.band(BANDS);
        if table.refit_room > 0 {
            waiting.start += table.geometry.waiting_in_former();
            waiting.end = waiting.start + table.refit_room;
        }
        let former = table.former.clone();
        Tiles {
            geometry: &table.geometry,
            live,
            sealed_at,
            sealed: table.sealed,
            changes: Vec::new(),
            sealed_rows: Vec::new(),
            waiting,
            waited,
            former,
        }
    }

    fn fill(&mut self, tile: usize, age: u64, (filling, places): Fill) {
        (self.live[tile], self.sealed_at[tile]) = (u64::MAX, age);
        self.sealed = self.sealed.max(age);
        self.changes.push(Change::Seal { tile, filling });
        self.sealed_rows.push((age, places));
    }

    /// Fill a tile of the first band.
    fn seal(&mut self, fill: Fill) -> Result<()> {
        let tile = self.take(0)?;
        self.fill(tile, self.sealed + 1, fill);
        Ok(())
    }

    /// Fill a tile of rows that wait.
    fn wait(&mut self, fill: Fill) -> Result<()> {
        let free = self.waiting.clone().find(|t| self.live[*t] == 0);
        let tile = match free {
            Some(tile) => tile,
            None if self.holes(self.waiting.clone()) >= TILE => self.compact(self.waiting.clone()),
            None => return Err(Error::Full("no tile is left to wait in".into())),
        };
        self.fill(tile, self.sealed + 1, fill);
        Ok(())
    }

    /// Tiles that rows can wait in.
    fn room_to_wait(&self) -> usize {
        let (mut free, mut holes) = (0, 0);
        for live in &self.live[self.waiting.clone()] {
            free += usize::from(*live == 0);
            holes += if *live == 0 { 0 } else { live.count_zeros() as usize };
        }
        free + holes / TILE
    }

    /// Whether there are tiles that wait or are in the former bases.
    fn are_to_be_coded(&self) -> bool {
        self.waited > 0 || self.former.contains(&true)
    }

    /// Bases come that take the place of others.
    fn outdate(&mut self) {
        self.former = self.live[..self.geometry.tiles].iter().map(|l| *l != 0).collect();
    }

    /// Code the rows that leave in bases that are new, and up to `most` of the tiles that are in the former ones or wait. The former ones are oldest, and
    /// come first and into the last band; then the youngest of those that wait get the finest bands. Layers change their bases one after another, so
    /// nothing is written where in this step a layer may still read something in the former ones.
    fn code_again(&mut self, leaving: Vec<Fill>, most: usize) -> Result<()> {
        let age = self.sealed;
        for (i, fill) in leaving.into_iter().enumerate().rev() {
            let tile = self.beside_waiting()?;
            self.fill(tile, age + 1 + i as u64, fill);
        }
        let mut former: Vec<usize> = (0..self.former.len()).filter(|t| self.former[*t] && self.live[*t] != 0).collect();
        former.sort_by_key(|t| self.sealed_at[*t]);
        for from in former.iter().take(most) {
            let bands = (0..BANDS).rev().flat_map(|band| self.geometry.band(band));
            let Some(to) = bands.filter(|t| *t < self.beside()).find(|t| self.is_free(*t)) else { break };
            self.recode(*from, to);
        }
        if !former.is_empty() {
            return Ok(());
        }
        let mut waiting: Vec<usize> = self.geometry.band(BANDS).filter(|t| self.live[*t] != 0).collect();
        waiting.sort_by_key(|t| std::cmp::Reverse(self.sealed_at[*t]));
        for from in waiting.into_iter().take(most) {
            // Where there is no room for all at once, what a step has coded makes room for the next.
            let Ok(to) = self.beside_waiting() else { break };
            self.recode(from, to);
        }
        Ok(())
    }

    fn is_free(&self, tile: usize) -> bool {
        self.live[tile] == 0 && !self.former[tile]
    }

    /// Tiles from the first on that lie before what waits and before former bases.
    fn beside(&self) -> usize {
        let former = if self.former.contains(&true) { self.geometry.waiting_in_former() } else { 0 };
        self.geometry.tiles_beside(self.waited.max(former))
    }

    /// The first free one of these, or one whose rows go to holes of others.
    fn beside_waiting(&mut self) -> Result<usize> {
        let beside = self.beside();
        if let Some(free) = (0..beside).find(|t| self.is_free(*t)) {
            return Ok(free);
        }
        let mut bands = (0..BANDS).map(|band| self.geometry.band(band)).map(|band| band.start.min(beside)..band.end.min(beside));
        match bands.find(|tiles| !self.former.contains(&true) && self.holes(tiles.clone()) >= TILE) {
            Some(tiles) => Ok(self.compact(tiles)),
            None => Err(Error::Full("no tile is free beside the rows that wait for a fit".into())),
        }
    }

    fn recode(&mut self, from: usize, to: usize) {
        let number = if from < self.former.len() && self.former[from] { self.geometry.former(from) } else { from };
        self.changes.push(Change::Recode { from: number, to });
        self.sealed_at[to] = self.sealed_at[from];
        self.live[to] = std::mem::take(&mut self.live[from]);
    }

    fn holes(&self, mut tiles: Range<usize>) -> usize {
        tiles.by_ref().map(|t| self.live[t].count_zeros() as usize).sum()
    }

    /// A free tile of a band, or of a later one when this band has none at all. Where holes make up a tile, its rows move together;
    /// else the oldest tile ages. So younger bands never have a tile of holes when a later one overflows.
    fn take(&mut self, band: usize) -> Result<usize> {
        let mut tiles = self.geometry.band(band);
        if let Some(free) = tiles.clone().find(|t| self.live[*t] == 0) {
            return Ok(free);
        }
        if self.holes(tiles.clone()) >= TILE {
            return Ok(self.compact(tiles));
        }
        if band + 1 == BANDS {
            return Err(Error::Full(format!("no hole is left in {} tiles", self.geometry.tiles)));
        }
        let Some(oldest) = tiles.by_ref().min_by_key(|t| self.sealed_at[*t]) else {
            return self.take(band + 1);
        };
        let to = self.take(band + 1)?;
        self.recode(oldest, to);
        Ok(oldest)
    }

    /// With `waiting` rows of a tile to come, make room for it a change at a time, so that the step that seals it only seals.
    fn prepare(&mut self, waiting: usize) {
        if self.geometry.band(0).any(|t| self.live[t] == 0) || self.geometry.band_tiles[0] == 0 {
            return;
        }
        let band = match waiting {
            n if n >= TILE * 2 / 3 => 0,
            n if n >= TILE / 3 && self.holes(self.geometry.band(0)) < TILE => 1,
            _ => return,
        };
        // Where there is no room yet, rows may be removed until the seal.
        let _ = self.take(band);
    }

    /// Empty the sparsest of some tiles into holes of the others.
    fn compact(&mut self, tiles: Range<usize>) -> usize {
        let victim = tiles.clone().min_by_key(|t| self.live[*t].count_ones()).expect("invariant: a band with holes has tiles");
        let mut target = tiles.start;
        let rows = std::mem::take(&mut self.live[victim]);
        for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
            while target == victim || self.live[target] == u64::MAX {
                target += 1;
            }
            let hole = self.live[target].trailing_ones() as usize;
            self.live[target] |= 1 << hole;
            self.changes.push(Change::Move { from: victim * TILE + row, to: target * TILE + hole });
        }
        victim
    }
}
