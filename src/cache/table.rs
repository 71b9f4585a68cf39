//! The host table of one stream: which cell's row is where, and what to do in the next step.
//!
//! A cell is llama.cpp's: an index with a position and sequences. The table learns what happened to cells (removed, shifted,
//! reused) by comparing, never by being told, so every sequence operation is exact without a hook of its own. New rows enter
//! exact slots or, when a ubatch is longer than the window, tiles directly. Rows that leave their sequence's window are sealed
//! 64 at a time into a tile of the finest band. A freed row is a hole; when a band runs out of tiles, rows of its sparse tiles
//! move, bit for bit, into holes of others; without enough holes its oldest tile is coded again in the next band. That happens while
//! the rows for a tile gather, one change in a step.
//! A table whose cells are all gone forgets its basis: what comes next gets the output it would get alone. With a calibration the
//! first step with rows is the one that "fits": it has nothing to look at, it stores the bases that the layers have.
//!
//! The fit is too much work for one decode step. From some rows before it on, plans say which heads to look at (a study), and then of
//! which heads to code the rows that the fit will seal, so that the step that fits finds that done; a step of many tokens fits at once,
//! and so does one after which the waiting rows have no slots. When a row that was coded ahead goes, its slot may get another one: the
//! study is given up and begins again.
//!
//! A plan is pending until `commit`. Freeing the rows of vanished cells is a fact and is not rolled back; everything else is
//! applied by `commit`. Must not know what rows contain, nor how many layers there are.

use super::plan::{self, Change, PlanData, SealRow, Source, Study, FIT_ROWS_MAX};
use crate::codec::anchor;
use crate::config::{Geometry, BANDS, FIT_LEAD, FIT_LOOK, MAX_QUERIES, QUERY_SLOTS, TILE};
use crate::error::{argument, Error, Result};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::Arc;

const NOWHERE: u32 = u32::MAX;
const CODED: u32 = 1 << 31;

/// The next [`Study::id`]: layers know studies of all tables of a process.
static STUDIES: AtomicI32 = AtomicI32::new(1);

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
    epoch: i32,
    queries: Vec<Option<(i32, i32)>>,
    seen: u64,
    /// The fit that is being prepared.
    study: Option<Preparation>,
    /// Slots whose rows plans of this study had coded ahead, be they committed or not.
    ahead: BTreeSet<usize>,
    /// A study that was given up and that layers have not been told of.
    given_up: i32,
    pending: Option<Pending>,
}

#[derive(Debug, Clone, Copy)]
struct Preparation {
    /// What is done.
    study: Study,
    /// Rows of a sequence at which it should be over.
    end: usize,
    /// Rows that each sequence that grows gets until then.
    coming: usize,
}

#[derive(Debug, Clone)]
struct Pending {
    data: PlanData,
    /// [`Table::study`] after it.
    study: Option<Preparation>,
    /// Position and sequence of every new token.
    token_places: Vec<(i32, i32)>,
    /// Cell of every sealed row and its `turn - position`, in the order of the seals.
    sealed_rows: Vec<[(u32, i32); TILE]>,
}

/// Where the rows of a saved state go; per-cell vectors are in the order of the cells given.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Bases exist afterwards.
    pub fitted: bool,
    /// The stream takes over the state's bases.
    pub adopt: bool,
    /// The stream held nothing before.
    pub was_empty: bool,
    /// Exact rows that move because their slots give way to bases: `(from, to)`.
    pub relocations: Vec<(u32, u32)>,
    /// Exact slot of each cell, or `None` when it is coded.
    pub slots: Vec<Option<u32>>,
    /// Tile row of each coded cell, in the saved band where that has room.
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
            Source::Slot(_) => None,
        }
    }
}

/// The rows of a sequence, without sinks, that are behind its window when `coming` ones have been added: tile by tile.
fn groups(rest: &[Candidate], window: usize, coming: usize) -> impl Iterator<Item = &[Candidate]> {
    rest.chunks_exact(TILE).take((rest.len() + coming).saturating_sub(window) / TILE)
}

/// Whether new rows are among these.
fn grows(rows: &[Candidate]) -> bool {
    rows.iter().any(|c| c.token().is_some())
}

/// The slots of rows that are sealed.
fn sealed_slots(changes: &[Change<[SealRow; TILE]>]) -> impl Iterator<Item = usize> + '_ {
    let rows = changes.iter().filter_map(|c| if let Change::Seal { rows, .. } = c { Some(rows) } else { None });
    rows.flatten().filter_map(|r| if let Source::Slot(slot) = r.source { Some(slot) } else { None })
}

/// The anchor of each row of a tile: that of the middle of its run of near positions. A row far from its anchor would lie
/// outside the frames the basis was fitted in; each further anchor costs attention one more projection.
fn anchors(group: &[Candidate]) -> Vec<i32> {
    let near = |a: &Candidate, b: &Candidate| b.pos - a.pos <= TILE as i32;
    group.chunk_by(near).flat_map(|run| std::iter::repeat_n(anchor(run[run.len() / 2].pos), run.len())).collect()
}

impl Table {
    /// An empty table.
    pub fn new(geometry: Arc<Geometry>) -> Self {
        let g = &geometry;
        Table {
            location: vec![NOWHERE; g.config.n_cells as usize],
            row_cell: vec![NOWHERE; g.tiles * TILE],
            row_turn: vec![0; g.tiles * TILE],
            live: vec![0; g.tiles],
            sealed_at: vec![0; g.tiles],
            sealed: 0,
            slot_cell: vec![NOWHERE; g.raw],
            slot_pos: vec![0; g.raw],
            fitted: false,
            epoch: 0,
            queries: vec![None; QUERY_SLOTS],
            seen: 0,
            study: None,
            ahead: BTreeSet::new(),
            given_up: 0,
            pending: None,
            geometry,
        }
    }

    /// A copy for another arena: what layers know of this one's rows stays with it.
    pub fn copied(&self) -> Self {
        let pending = self.pending.clone().map(|p| Pending { study: None, ..p });
        Table { study: None, ahead: BTreeSet::new(), given_up: 0, pending, ..self.clone() }
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
        *self = Table { epoch, given_up: self.given_up, ..Table::new(self.geometry.clone()) };
    }

    /// Bases exist.
    pub fn is_fitted(&self) -> bool {
        self.fitted
    }

    /// A plan waits for its commit.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
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
        self.ahead.clear();
        if let Some(p) = self.study.take() {
            self.given_up = p.study.id;
        }
    }

    fn free(&mut self, cell: usize) {
        match self.locate(cell) {
            Some((Location::Slot(slot), _)) => {
                self.slot_cell[slot] = NOWHERE;
                if self.ahead.contains(&slot) {
                    self.give_up();
                }
            }
            Some((Location::Coded(tile, row), _)) => {
                self.row_cell[tile * TILE + row] = NOWHERE;
                self.live[tile] &= !(1 << row);
            }
            None => {}
        }
        self.location[cell] = NOWHERE;
    }

    fn check_new(&self, cells: &Cells, new: &[u32]) -> Result<()> {
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
            self.fitted = false;
            self.queries.fill(None);
            self.seen = 0;
            self.give_up();
        }
    }

    /// Plan one step: the new tokens go to the cells `new`, in order. Writes the plan to `out` and returns its length.
    pub fn plan(&mut self, cells: Cells, new: &[u32], out: &mut [i32]) -> Result<usize> {
        self.check_new(&cells, new)?;
        let need = plan::capacity(&self.geometry, new.len());
        if out.len() < need {
            return Err(Error::Buffer { need, have: out.len() });
        }
        self.pending = None;
        self.reconcile(&cells, new);
        let data = PlanData {
            epoch: self.epoch.wrapping_add(1).max(1),
            fitted: self.fitted,
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
        let tiles = self.live.iter().enumerate().filter(|(_, l)| **l != 0).map(|(tile, _)| {
            let mut rows = [(-1, 0); TILE];
            for (row, out) in rows.iter_mut().enumerate() {
                let cell = self.row_cell[tile * TILE + row];
                if cell != NOWHERE {
                    *out = (cell as i32, self.row_turn[tile * TILE + row].wrapping_add(cells.pos[cell as usize]));
                }
            }
            (tile as u32, rows)
        });
        let used = pending.data.write(tiles, out)?;
        self.ahead.extend(sealed_slots(&pending.data.ahead));
        self.pending = Some(pending);
        Ok(used)
    }

    /// Decide where the new rows go, what is sealed, moved and fitted.
    fn place(&self, mut data: PlanData, cells: &Cells, new: &[u32]) -> Result<Pending> {
        let g = &self.geometry;
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
        let sequences: Vec<&[Candidate]> = candidates.chunk_by(|a, b| a.seq == b.seq).collect();
        let sinks = |s: &[Candidate]| s.iter().take(g.config.sinks as usize).take_while(|c| c.pos < g.config.sinks as i32).count();

        let mut study = self.study;
        if g.tiles > 0 && !self.fitted && !new.is_empty() {
            let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
            let next = self.next_study(&sequences, candidates.len(), longest, new.len());
            study = next.or(study.map(|p| Preparation { study: Study { from: p.study.to, ..p.study }, ..p }));
            data.study = study.map_or(Study::default(), |p| p.study);
            data.fit = candidates.len() > g.raw || longest >= g.fit_rows && (next.is_none() || data.study.from == data.study.to);
            if data.fit {
                // What is left is looked at in the fit.
                data.study.from = data.study.to;
                study = None;
            }
        }
        if g.keeps_queries() && !self.fitted {
            let stride = (g.fit_rows / QUERY_SLOTS).max(1) as u64;
            for i in 0..new.len() {
                let n = self.seen + i as u64;
                if n.is_multiple_of(stride) {
                    data.records.push((i as u32, (n / stride % QUERY_SLOTS as u64) as u32));
                }
            }
            if data.fit || data.study.from < data.study.to.min(g.n_heads() as i32) {
                self.fit_on(&mut data, &sequences, sinks, &at, new);
            }
        }

        if !new.is_empty() && data.study.id == 0 {
            data.study.id = -self.given_up;
        }

        let (mut sealed_rows, mut leaving) = (Vec::new(), vec![false; new.len()]);
        let mut tiles = Tiles::new(self);
        let (window, rests) = (g.config.window as usize, sequences.iter().map(|s| &s[sinks(s)..]));
        if self.fitted || data.fit {
            let most = rests.clone().map(|rest| rest.len().saturating_sub(window)).max().unwrap_or(0);
            if most < TILE && !new.is_empty() {
                tiles.prepare(most);
            }
            for group in rests.flat_map(|rest| groups(rest, window, 0)) {
                let anchors = tiles.seal(group)?;
                sealed_rows.push(std::array::from_fn(|i| (group[i].cell, anchors[i].wrapping_sub(group[i].pos))));
                group.iter().filter_map(Candidate::token).for_each(|t| leaving[t] = true);
            }
            data.changes = tiles.changes;
        } else if let Some(p) = study.filter(|p| (g.n_heads() as i32..p.study.to).contains(&p.study.from)) {
            let groups = rests.flat_map(|rest| groups(rest, window, if grows(rest) { p.coming } else { 0 }));
            // What is not in slots yet, or finds no tile, is left to the fit.
            let _ = groups.take_while(|group| !grows(group)).try_for_each(|group| tiles.seal(group).map(drop));
            data.ahead = tiles.changes;
        }
        self.slots(&mut data, new, &leaving)?;
        let token_places = new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect();
        Ok(Pending { data, study, token_places, sealed_rows })
    }

    /// What this step does for a fit to come; `None` when nothing can be prepared: it is early, or rows come in faster than that.
    fn next_study(&self, sequences: &[&[Candidate]], rows: usize, longest: usize, tokens: usize) -> Option<Preparation> {
        let g = &self.geometry;
        if !g.keeps_queries() || tokens > MAX_QUERIES {
            return None;
        }
        let growth = tokens.div_ceil(sequences.iter().filter(|s| grows(s)).count().max(1));
        let (study, end) = match self.study {
            Some(Preparation { study, end, .. }) => (Study { from: study.to, ..study }, end),
            None if longest + FIT_LEAD >= g.fit_rows || rows + FIT_LEAD >= g.raw => {
                let id = STUDIES.fetch_add(1, Relaxed).max(1);
                (Study { id, ..Study::default() }, g.fit_rows.max(longest + FIT_LEAD))
            }
            None => return None,
        };
        // Steps like this one until the fit is wanted, or has to be.
        let steps = (end.saturating_sub(longest) / growth).min(g.raw.saturating_sub(rows) / tokens);
        let (from, n) = (study.from as usize, g.n_heads());
        let left = 2 * n - from;
        if steps == 0 {
            return (left == 0).then_some(Preparation { study, end, coming: 0 });
        }
        // A head is coded when all of its layer were looked at.
        let looks = n.saturating_sub(from);
        let share = (left + looks * (FIT_LOOK - 1)).div_ceil(steps);
        let to = from + if looks > 0 { looks.min(share.div_ceil(FIT_LOOK)) } else { share };
        // The fit waits for what is left to code, and for its rows.
        let until = left.max(g.fit_rows.saturating_sub(longest) / growth).min(steps);
        Some(Preparation { study: Study { to: to as i32, ..study }, end, coming: until * growth })
    }

    /// Give slots to the tokens that stay exact and, at the fit, to the rows that must leave the temporary ones.
    fn slots(&self, data: &mut PlanData, new: &[u32], leaving: &[bool]) -> Result<()> {
        let g = &self.geometry;
        let mut taken: Vec<bool> = self.slot_cell.iter().map(|c| *c != NOWHERE).collect();
        sealed_slots(&data.changes).for_each(|slot| taken[slot] = false);
        let limit = if self.fitted || data.fit { g.exact } else { g.raw };
        let mut free = 0;
        let mut next = |taken: &mut [bool]| -> Result<u32> {
            while free < limit && taken[free] {
                free += 1;
            }
            if free == limit {
                return Err(Error::Full(format!("all {limit} exact slots are taken by {} sequences", g.config.n_seqs)));
            }
            taken[free] = true;
            Ok(free as u32)
        };
        if data.fit {
            for slot in g.exact..g.raw {
                if taken[slot] {
                    data.relocations.push((slot as u32, next(&mut taken)?));
                }
            }
        }
        for (cell, leaves) in new.iter().zip(leaving) {
            let slot = if *leaves { -1 } else { next(&mut taken)? as i32 };
            data.tokens.push((*cell, slot));
        }
        Ok(())
    }

    fn fit_on(
        &self,
        data: &mut PlanData,
        sequences: &[&[Candidate]],
        sinks: impl Fn(&[Candidate]) -> usize,
        at: &impl Fn(u32) -> (i32, i32),
        new: &[u32],
    ) {
        for s in sequences {
            for group in s[sinks(s)..].chunks(TILE) {
                for (c, anchor) in group.iter().zip(anchors(group)) {
                    let turn = c.stored_turn.wrapping_sub(anchor);
                    data.fit_rows.push((SealRow { source: c.source, turn }, c.pos, c.seq));
                }
            }
        }
        data.fit_rows.truncate(FIT_ROWS_MAX);
        let mut queries = self.queries.clone();
        for (token, slot) in &data.records {
            let (seq, pos) = at(new[*token as usize]);
            queries[*slot as usize] = Some((pos, seq));
        }
        data.fit_queries = queries.iter().enumerate().filter_map(|(i, q)| q.map(|(pos, seq)| (i as u32, pos, seq))).collect();
    }

    /// The graph of the pending plan ran to its end: the plan becomes fact.
    pub fn commit(&mut self) -> Result<()> {
        self.finish(true)
    }

    /// The graph of the pending plan failed and every layer replayed it: take over all but the new tokens. When that plan was
    /// to fit and few rows were stored before it, there is nothing to fit on and the waiting rows may be gone: the table forgets
    /// all rows and says so.
    pub fn commit_replayed(&mut self) -> Result<()> {
        let too_few = |p: &Pending| plan::replay_is_lost(&self.geometry, p.data.fit_rows.iter().map(|r| r.0.source));
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
        self.fitted |= p.data.fit;
        if with_tokens || p.data.fit {
            self.study = p.study;
        }
        if self.fitted {
            self.ahead.clear();
        }
        let mut sealed_rows = p.sealed_rows.iter();
        for change in &p.data.changes {
            match change {
                Change::Move { from, to } => self.move_coded(*from, *to),
                Change::Recode { from, to } => {
                    (0..TILE).for_each(|row| self.move_coded(from * TILE + row, to * TILE + row));
                    self.sealed_at[*to] = self.sealed_at[*from];
                }
                Change::Seal { tile, rows } => {
                    self.sealed += 1;
                    self.sealed_at[*tile] = self.sealed;
                    let places = sealed_rows.next().expect("invariant: a place for every sealed row");
                    for (row, (r, (cell, turn))) in rows.iter().zip(places).enumerate() {
                        match r.source {
                            Source::Slot(s) => self.slot_cell[s] = NOWHERE,
                            Source::Token(_) if !with_tokens => continue,
                            Source::Token(_) => {}
                        }
                        self.put_coded(*cell, *tile * TILE + row, *turn);
                    }
                }
            }
        }
        for (from, to) in &p.data.relocations {
            let (from, to) = (*from as usize, *to as usize);
            let cell = std::mem::replace(&mut self.slot_cell[from], NOWHERE);
            self.put_exact(cell, to, self.slot_pos[from]);
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
        }
        if self.fitted {
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

    /// Where the rows of a saved state go. `coded` (the band, `None` when exact) and `turns` (less position) are the state's; see [`crate::state`].
    pub fn plan_restore(&mut self, cells: Cells, new: &[u32], coded: &[Option<usize>], turns: &[i32], saved_fitted: bool) -> Result<Restore> {
        self.check_new(&cells, new)?;
        self.pending = None;
        self.reconcile(&cells, new);
        let g = self.geometry.clone();
        let was_empty = self.location.iter().all(|l| *l == NOWHERE);
        let fitted = self.fitted || saved_fitted;
        let mut r = Restore {
            fitted,
            adopt: saved_fitted && !self.fitted,
            was_empty,
            relocations: Vec::new(),
            slots: vec![None; new.len()],
            rows: vec![NOWHERE; new.len()],
            turns: vec![0; new.len()],
            row_turns: turns.to_vec(),
            places: new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect(),
        };
        let limit = if fitted { g.exact } else { g.raw };
        let mut free: Vec<u32> = (0..limit).rev().filter(|s| self.slot_cell[*s] == NOWHERE).map(|s| s as u32).collect();
        let full = |n: usize| Error::Full(format!("{n} exact rows do not fit into the slots that are free"));
        for slot in limit..g.raw {
            if self.slot_cell[slot] != NOWHERE {
                r.relocations.push((slot as u32, free.pop().ok_or_else(|| full(1))?));
            }
        }
        // Sinks and the newest rows first: what finds no slot is coded.
        let mut exact: Vec<usize> = (0..new.len()).filter(|i| coded[*i].is_none()).collect();
        exact.sort_by_key(|i| (r.places[*i].0 >= g.config.sinks as i32, std::cmp::Reverse(r.places[*i].0)));
        for i in exact {
            r.slots[i] = free.pop();
            if r.slots[i].is_some() {
                continue;
            }
            if !fitted {
                return Err(full(new.len()));
            }
            let pos = r.places[i].0;
            let anchor = anchor(pos);
            r.turns[i] = turns[i].wrapping_add(pos).wrapping_sub(anchor);
            r.row_turns[i] = anchor.wrapping_sub(pos);
        }
        let mut holes: [_; BANDS] = std::array::from_fn(|band| {
            let (whole, partial): (Vec<usize>, Vec<usize>) = g.band(band).partition(|t| self.live[*t] == 0);
            let live = &self.live;
            whole.into_iter().chain(partial).flat_map(|t| (0..TILE).map(move |row| (t, row))).filter(|(t, row)| live[*t] >> row & 1 == 0)
        });
        for i in (0..new.len()).filter(|i| r.slots[*i].is_none()) {
            // Exact rows that found no slot are young. What a band has no room for is coded again, coarser if possible.
            let band = coded[i].unwrap_or(0);
            let (tile, row) = (band..BANDS)
                .chain((0..band).rev())
                .find_map(|b| holes[b].next())
                .ok_or_else(|| Error::Full("no tile row is free for the saved rows".into()))?;
            r.rows[i] = (tile * TILE + row) as u32;
        }
        Ok(r)
    }

    /// The rows of a state are in their places.
    pub fn commit_restore(&mut self, r: &Restore, new: &[u32]) {
        self.fitted = r.fitted;
        self.give_up();
        for (from, to) in &r.relocations {
            let cell = std::mem::replace(&mut self.slot_cell[*from as usize], NOWHERE);
            self.put_exact(cell, *to as usize, self.slot_pos[*from as usize]);
        }
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

    /// The places of the queries kept for the fit.
    pub fn queries_to_bytes(&self) -> Vec<u8> {
        let places = self.queries.iter().map(|q| q.unwrap_or((-1, -1)));
        self.seen.to_le_bytes().into_iter().chain(places.flat_map(|(pos, seq)| [pos.to_le_bytes(), seq.to_le_bytes()]).flatten()).collect()
    }

    /// Take over what [`Table::queries_to_bytes`] gave, as queries of `seq` if one is given.
    pub fn queries_from_bytes(&mut self, bytes: &[u8], as_seq: Option<i32>) -> Result<()> {
        let Some((seen, places)) = bytes.split_first_chunk::<8>().filter(|(_, p)| p.len() == 8 * QUERY_SLOTS) else {
            return Err(Error::Data("state: the list of queries has another length".into()));
        };
        self.seen = u64::from_le_bytes(*seen);
        let int = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
        for (q, p) in self.queries.iter_mut().zip(places.chunks_exact(8)) {
            let (pos, seq) = (int(&p[..4]), int(&p[4..]));
            *q = (pos >= 0).then_some((pos, as_seq.unwrap_or(seq)));
        }
        Ok(())
    }
}

/// The tiles as they will be: makes room in bands, and notes what that takes.
struct Tiles<'a> {
    geometry: &'a Geometry,
    live: Vec<u64>,
    sealed_at: Vec<u64>,
    sealed: u64,
    changes: Vec<Change<[SealRow; TILE]>>,
}

impl<'a> Tiles<'a> {
    fn new(table: &'a Table) -> Self {
        let (live, sealed_at) = (table.live.clone(), table.sealed_at.clone());
        Tiles { geometry: &table.geometry, live, sealed_at, sealed: table.sealed, changes: Vec::new() }
    }

    /// Fill a tile of the first band. Gives the anchors of its rows.
    fn seal(&mut self, group: &[Candidate]) -> Result<Vec<i32>> {
        let (tile, anchors) = (self.take(0)?, anchors(group));
        let rows = std::array::from_fn(|i| SealRow { source: group[i].source, turn: group[i].stored_turn.wrapping_sub(anchors[i]) });
        self.sealed += 1;
        (self.live[tile], self.sealed_at[tile]) = (u64::MAX, self.sealed);
        self.changes.push(Change::Seal { tile, rows });
        Ok(anchors)
    }

    /// A free tile of a band, or of a later one when this band has none at all. Where holes make up a tile, its rows move together;
    /// else the oldest tile ages. So younger bands never have a tile of holes when a later one overflows.
    fn take(&mut self, band: usize) -> Result<usize> {
        let mut tiles = self.geometry.band(band);
        if let Some(free) = tiles.clone().find(|t| self.live[*t] == 0) {
            return Ok(free);
        }
        let holes: usize = tiles.clone().map(|t| self.live[t].count_zeros() as usize).sum();
        if holes >= TILE {
            return Ok(self.compact(band));
        }
        if band + 1 == BANDS {
            return Err(Error::Full(format!("no hole is left in {} tiles", self.live.len())));
        }
        let Some(oldest) = tiles.by_ref().min_by_key(|t| self.sealed_at[*t]) else {
            return self.take(band + 1);
        };
        let to = self.take(band + 1)?;
        self.changes.push(Change::Recode { from: oldest, to });
        self.sealed_at[to] = self.sealed_at[oldest];
        self.live[to] = std::mem::take(&mut self.live[oldest]);
        Ok(oldest)
    }

    /// With `waiting` rows of a tile to come, make room for it a change at a time, so that the step that seals it only seals.
    fn prepare(&mut self, waiting: usize) {
        if self.geometry.band(0).any(|t| self.live[t] == 0) || self.geometry.band_tiles[0] == 0 {
            return;
        }
        let holes: usize = self.geometry.band(0).map(|t| self.live[t].count_zeros() as usize).sum();
        let band = match waiting {
            n if n >= TILE * 2 / 3 => 0,
            n if n >= TILE / 3 && holes < TILE => 1,
            _ => return,
        };
        // Where there is no room yet, rows may be removed until the seal.
        let _ = self.take(band);
    }

    /// Empty the sparsest tile of a band into holes of its others.
    fn compact(&mut self, band: usize) -> usize {
        let tiles = self.geometry.band(band);
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
