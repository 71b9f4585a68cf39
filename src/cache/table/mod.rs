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
//! Before there are bases, rows that leave the window wait in tiles of 8 bits per element (6 in small contexts). Plans say which heads to analyse for
//! the fit (a study), in steps of few tokens a few at a time, in long ones all at once. The step after the last one writes the bases and codes what
//! waited. Where rows come faster than they can wait, the step that finds no room studies and fits at once. With a calibration the first step with rows
//! is the one that "fits": it has nothing to study.
//!
//! The bases may fit what came first and not what comes later, and few rows make worse ones than many. Layers note how well the newest rows would be
//! coded; where that has become worse, or there is room for many more rows than the bases were fitted on, rows wait once more for another fit.
//! Then the tiles that there are, now in the former bases, are coded again, as many in a step as it has tokens, each into a free one: layers change their
//! bases one after another, so what a step empties is filled in a later one.
//!
//! `step` decides where the rows of a step go, `fit` when bases are fitted and on what, `tiles` how room is made, `restore` where saved rows go; `places`
//! keeps where every row is, and `cells` compares that with what the caller says.
//!
//! A plan is pending until `commit`. Freeing the rows of vanished cells is a fact and is not rolled back; everything else is
//! applied by `commit`. Must not know what rows contain.

mod cells;
mod fit;
mod places;
mod restore;
mod step;
mod tiles;

pub use cells::Cells;
pub use places::Location;
pub use restore::Restore;

use super::findings::Findings;
use super::plan::{self, PlanData};
use crate::error::{argument, Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::{QUERY_SLOTS, RECENT_QUERIES, TILE};
use fit::Progress;
use places::{Places, NOWHERE};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::Arc;

/// The next [`plan::Study::id`] and [`PlanData::stream`]: layers know those of all tables of a process.
static NUMBERS: AtomicI32 = AtomicI32::new(1);

fn new_number() -> i32 {
    NUMBERS.fetch_add(1, Relaxed).max(1)
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Table {
    geometry: Arc<Geometry>,
    findings: Arc<Findings>,
    /// See [`PlanData::stream`].
    stream: i32,
    places: Places,
    fitted: bool,
    /// Rows that the present bases were fitted on, without those after which they drifted.
    fitted_on: usize,
    /// Whether more rows would make better bases has been asked since.
    asked_for_more: bool,
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
    study: Option<Progress>,
    /// A study that was given up and that layers have not been told of.
    given_up: i32,
    pending: Option<Pending>,
}

#[derive(Debug, Clone)]
struct Pending {
    data: PlanData,
    /// [`Table::study`] after it.
    study: Option<Progress>,
    /// Rows wait no longer for another fit.
    gives_up: bool,
    /// Position and sequence of every new token.
    token_places: Vec<(i32, i32)>,
    /// In the order of the tiles that are filled: when their rows were sealed, and of each its cell and its `turn - position`.
    sealed: Vec<(u64, [(u32, i32); TILE])>,
}

impl Table {
    /// An empty table.
    pub fn new(geometry: Arc<Geometry>, findings: Arc<Findings>) -> Self {
        Table {
            findings,
            stream: new_number(),
            places: Places::new(geometry.clone()),
            fitted: false,
            fitted_on: 0,
            asked_for_more: false,
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

    /// Forget the queries of tokens at a position or behind it, whichever sequence they are of.
    pub fn forget_queries(&mut self, from: i32) {
        for query in self.queries.iter_mut().chain(&mut self.recent) {
            *query = query.filter(|(pos, _)| *pos < from);
        }
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
        self.places.number(tile)
    }

    /// Where a cell's row is, and its turn less its position; `None` when there is none.
    pub fn locate(&self, cell: usize) -> Option<(Location, i32)> {
        self.places.locate(cell)
    }

    /// Plan one step: the new tokens go to the cells `new`, in order. Writes the plan to `out` and returns its length.
    pub fn plan(&mut self, cells: Cells, new: &[u32], out: &mut [i32]) -> Result<usize> {
        cells.check(self.places.location.len(), new)?;
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
            former: self.places.former_tiles().next().is_some(),
            exact: self.places.exact_rows(&cells).collect(),
            ..PlanData::default()
        };
        let pending = self.place(data, &cells, new)?;
        let used = pending.data.write(self.places.tiles(&cells), out)?;
        self.pending = Some(pending);
        Ok(used)
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
        if lost && self.places.slot_cell.iter().any(|c| *c != NOWHERE) {
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
            self.take_over_fit(&p);
        }
        if with_tokens || p.data.fit {
            if p.gives_up {
                self.give_up();
                self.refit_room = 0;
            }
            self.study = p.study;
        }
        self.places.carry_out(&p.data.changes, &p.sealed, with_tokens);
        if with_tokens {
            self.take_over_tokens(&p);
        }
        if !self.waits() {
            self.queries.fill(None);
            self.seen = 0;
        } else if with_tokens {
            self.seen += p.data.tokens.len() as u64;
        }
        Ok(())
    }

    /// There are new bases; nobody needs any longer what was found for them.
    fn take_over_fit(&mut self, p: &Pending) {
        let fitted = self.fitted;
        let Places { former, live, .. } = &mut self.places;
        former.iter_mut().zip(live).for_each(|(former, live)| *former = fitted && *live != 0);
        (self.fitted, self.refit_room, self.given_up) = (true, 0, p.data.study.id.max(0));
        self.fitted_on = self.study.map_or(p.data.fit_rows.len(), |s| s.rows);
        self.asked_for_more = false;
        self.findings.forget_drift(self.stream);
    }

    /// The new tokens are stored.
    fn take_over_tokens(&mut self, p: &Pending) {
        for ((cell, slot), (pos, _)) in p.data.tokens.iter().zip(&p.token_places) {
            if let Ok(slot) = usize::try_from(*slot) {
                self.places.put_exact(*cell, slot, *pos);
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
}
