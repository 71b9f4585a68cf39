//! When bases are fitted, which heads are studied for that in which step, and on which rows and queries.
//!
//! Must not know where rows go, nor what is found in them.

use super::places::{CODED, NOWHERE};
use super::step::{anchors, Candidate};
use super::tiles::Tiles;
use super::{new_number, Cells, Table};
use crate::cache::plan::{PlanData, SealRow, Source, Study, FIT_ROWS_MAX};
use crate::layout::{QUERY_SLOTS, TILE};
use std::collections::BTreeMap;

/// Rows that come in while heads are studied in steps of few tokens.
const FIT_LEAD: usize = 96;
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
/// Fewest tiles of new rows for another fit.
const REFIT_LEAST: usize = 4;

/// How far a study has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Number of the study.
    pub id: i32,
    /// Heads that were studied, counted over all layers.
    pub heads: usize,
    /// Rows of their sample.
    pub rows: usize,
}

impl Table {
    /// The fit is no longer being prepared.
    pub(super) fn give_up(&mut self) {
        if let Some(study) = self.study.take() {
            self.given_up = study.id;
        }
    }

    /// Begin to gather rows for another fit if the bases no longer fit what comes, or were fitted on few rows, and there is room to code everything again.
    pub(super) fn watch(&mut self) {
        let g = &self.geometry;
        if !self.fitted || !g.keeps_queries() || self.refit_room > 0 || self.places.former_tiles().next().is_some() || self.places.waited() > 0 {
            return;
        }
        let drifts = self.findings.drift(self.stream).filter(|(_, n)| *n >= DRIFT_SAMPLES * g.n_heads());
        let first_time = !std::mem::replace(&mut self.asked_for_more, true);
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
        let (used, last) = (self.places.live.iter().filter(|l| **l != 0).count(), self.places.live.iter().rposition(|l| *l != 0).unwrap_or(0));
        let fits = |n: &usize| last < g.tiles_beside(first + n) && g.can_code_all(used, used, first..first + n);
        (REFIT_LEAST..=g.waiting.saturating_sub(first)).rev().find(fits).unwrap_or(0)
    }

    /// Rows wait, for the first fit or another.
    pub(super) fn waits(&self) -> bool {
        !self.fitted || self.refit_room > 0
    }

    /// Whether this step fits, and which heads it studies for a fit to come. Gives the study after it.
    pub(super) fn prepare_fit(&self, data: &mut PlanData, tiles: &Tiles, cells: &Cells, new: &[u32], leaving: usize) -> Option<Progress> {
        let g = &self.geometry;
        if !self.waits() || g.tiles == 0 || new.is_empty() {
            return self.study;
        }
        let room = tiles.room_to_wait();
        data.shared = g.config.calibrated || self.study.is_some_and(|s| s.heads == g.n_heads());
        if self.fitted && !data.shared && leaving > room {
            return None;
        }
        data.fit = data.shared || leaving > room;
        let study = if data.fit { self.study } else { self.next_study(room - leaving, cells, new).or(self.study) };
        let studied = self.study.map_or(0, |s| s.heads);
        if let Some(s) = study {
            data.study = Study { id: s.id, from: studied as i32, to: s.heads as i32 };
        }
        if data.fit {
            return None;
        }
        study
    }

    /// The study with what this step adds to it, if it is time for that: with `room` tiles left for rows to wait in.
    fn next_study(&self, room: usize, cells: &Cells, new: &[u32]) -> Option<Progress> {
        let g = &self.geometry;
        let (mut rows, mut growth) = (BTreeMap::<i32, usize>::new(), BTreeMap::<i32, usize>::new());
        // For another fit only rows count that came since: they wait or are exact.
        let is_old = |cell: usize| {
            self.places.location[cell] != NOWHERE
                && self.places.location[cell] & CODED != 0
                && self.places.location[cell] & !CODED < (g.tiles * TILE) as u32
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
            None => Progress { id: new_number(), heads: 0, rows: 0 },
        };
        let left = g.n_heads() - study.heads;
        Some(Progress { heads: study.heads + left.div_ceil(steps + 1), ..study })
    }

    /// Which tokens leave their queries behind for a fit.
    pub(super) fn keep_queries(&self, data: &mut PlanData, new: &[u32], studies_again: bool) {
        let g = &self.geometry;
        if g.keeps_queries() && self.waits() && (studies_again || !(data.fit && data.shared)) {
            let rows = if self.fitted { self.refit_room * TILE + g.config.window as usize } else { g.fit_rows };
            let stride = (rows.min(g.fit_rows) / QUERY_SLOTS).max(1) as u64;
            let at = |i: usize| self.seen + i as u64;
            let kept = (0..new.len()).filter(|i| at(*i).is_multiple_of(stride));
            data.records = kept.map(|i| (i as u32, (at(i) / stride % QUERY_SLOTS as u64) as u32)).collect();
            // Slots that are written twice in a step keep the later one.
            let surplus = data.records.len().saturating_sub(QUERY_SLOTS);
            data.records.drain(..surplus);
        }
    }

    /// The rows and queries that there are to fit on. Gives how many rows say something about those to come.
    pub(super) fn sample(&self, data: &mut PlanData, cells: &Cells, sequences: &[&[Candidate]], new: &[u32]) -> usize {
        let g = &self.geometry;
        // As many old tiles, which other bases coded, as there is room for: rows that are all alike make the same error, which no mean takes away.
        let (old, waiting): (Vec<usize>, Vec<usize>) = (0..self.places.live.len()).filter(|t| self.places.live[*t] != 0).partition(|t| *t < g.tiles);
        let own = waiting.len() * TILE + sequences.iter().map(|s| s.len()).sum::<usize>();
        let every = old.len().div_ceil((FIT_ROWS_MAX.saturating_sub(own) / TILE).max(1)).max(1);
        for tile in old.into_iter().step_by(every).chain(waiting) {
            for row in (tile * TILE..(tile + 1) * TILE).filter(|row| self.places.row_cell[*row] != NOWHERE) {
                let cell = self.places.row_cell[row] as usize;
                let (pos, seq) = (cells.pos[cell], cells.seq[cell]);
                data.fit_rows.push((SealRow { source: Source::Coded(row), turn: self.places.row_turn[row].wrapping_add(pos) }, pos, seq));
            }
        }
        // Sinks are not fitted on, but draw attention.
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
}
