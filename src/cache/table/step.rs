//! Where a step's rows go: which leave their window, what they fill, which slots the others get, and whose queries are kept.
//!
//! Must not know what a fit needs (`fit.rs`), nor how tiles are made free (`tiles.rs`).

use super::places::NOWHERE;
use super::tiles::{Fill, Tiles};
use super::{Cells, Pending, Table};
use crate::cache::plan::{Change, Filling, PlanData, SealRow, Source, WITNESSES};
use crate::error::{Error, Result};
use crate::layout::{anchor, RECENT_QUERIES, TILE};

/// Of recent tokens every one whose position is a multiple of this leaves its query.
const RECENT_STRIDE: i32 = 8;
/// How far behind the last row of a tile queries begin and end to tell which of its rows draw attention: nearer ones look at every neighbour.
const WITNESS_DISTANCE: std::ops::RangeInclusive<i32> = 32..=128;

/// A row that is exact before the step, or comes in it.
#[derive(Clone, Copy)]
pub struct Candidate {
    pub seq: i32,
    pub pos: i32,
    pub cell: u32,
    pub source: Source,
    pub stored_turn: i32,
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
pub fn anchors(group: &[Candidate]) -> Vec<i32> {
    let near = |a: &Candidate, b: &Candidate| b.pos - a.pos <= TILE as i32;
    group.chunk_by(near).flat_map(|run| std::iter::repeat_n(anchor(run[run.len() / 2].pos), run.len())).collect()
}

impl Table {
    /// Decide where the new rows go, what is sealed, moved and fitted.
    pub(super) fn place(&self, mut data: PlanData, cells: &Cells, new: &[u32]) -> Result<Pending> {
        let candidates = self.candidates(&data, cells, new);
        let sequences: Vec<&[Candidate]> = candidates.chunk_by(|a, b| a.seq == b.seq).collect();
        let rests: Vec<&[Candidate]> = sequences.iter().map(|s| &s[self.sinks(s)..]).collect();
        let window = self.geometry.config.window as usize;
        let leaving: Vec<&[Candidate]> = if self.geometry.tiles > 0 { rests.iter().flat_map(|r| groups(r, window)).collect() } else { vec![] };

        let mut tiles = Tiles::new(self);
        let mut study = self.prepare_fit(&mut data, &tiles, cells, new, leaving.len());
        // Rows come faster than they can wait for another fit: the present bases have to do.
        let gives_up = self.refit_room > 0 && !data.fit && leaving.len() > tiles.room_to_wait();
        // Rows of a long step that are coded in it were in no sample: heads are studied once more.
        let studies_again = data.fit && data.shared && !self.fitted && self.geometry.keeps_queries() && new.len() > window;
        self.keep_queries(&mut data, new, studies_again);
        self.keep_recent_queries(&mut data, cells, new);
        if data.fit && !data.shared || data.study.from < data.study.to || studies_again {
            let rows = self.sample(&mut data, cells, &sequences, new);
            study.iter_mut().for_each(|study| study.rows = rows);
        }
        if !new.is_empty() && data.study.id == 0 {
            data.study.id = -self.given_up;
        }

        if !new.is_empty() && self.geometry.tiles > 0 {
            self.fill_tiles(&data, &mut tiles, &rests, &leaving, new.len())?;
        }
        data.changes = tiles.changes;
        self.slots(&mut data, new)?;
        let token_places = new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect();
        Ok(Pending { data, study, gives_up, token_places, sealed: tiles.sealed_rows })
    }

    /// Fill tiles with the rows that leave, and make those changes to others for which it is time.
    fn fill_tiles(&self, data: &PlanData, tiles: &mut Tiles, rests: &[&[Candidate]], leaving: &[&[Candidate]], tokens: usize) -> Result<()> {
        let fill = |group: &&[Candidate]| self.fill(group, rests);
        if !data.fit && self.waits() && leaving.len() <= tiles.room_to_wait() {
            return leaving.iter().try_for_each(|group| tiles.wait(fill(group)));
        }
        if data.fit {
            tiles.outdate();
        }
        if data.fit || tiles.are_to_be_coded() {
            return tiles.code_again(leaving.iter().map(fill).collect(), tokens);
        }
        let window = self.geometry.config.window as usize;
        let most = rests.iter().map(|rest| rest.len().saturating_sub(window)).max().unwrap_or(0);
        if most < TILE {
            tiles.prepare(most);
        }
        leaving.iter().try_for_each(|group| tiles.seal(fill(group)))
    }

    /// What a tile is filled with.
    fn fill(&self, group: &[Candidate], rests: &[&[Candidate]]) -> Fill {
        let (witnesses, anchors) = (self.witnesses(group, rests), anchors(group));
        let rows = std::array::from_fn(|i| SealRow { source: group[i].source, turn: group[i].stored_turn.wrapping_sub(anchors[i]) });
        let places = std::array::from_fn(|i| (group[i].cell, anchors[i].wrapping_sub(group[i].pos)));
        (Filling { rows, witnesses }, places)
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
    pub(super) fn sinks(&self, rows: &[Candidate]) -> usize {
        let sinks = self.geometry.config.sinks;
        rows.iter().take(sinks as usize).take_while(|c| c.pos < sinks as i32).count()
    }

    /// Which tokens leave their queries behind as recent ones.
    fn keep_recent_queries(&self, data: &mut PlanData, cells: &Cells, new: &[u32]) {
        if self.geometry.tiles == 0 {
            return;
        }
        let recent: Vec<usize> = (0..new.len()).filter(|i| cells.pos[new[*i] as usize] % RECENT_STRIDE == 0).collect();
        let kept = &recent[recent.len().saturating_sub(RECENT_QUERIES)..];
        let slot = |i: usize| ((self.recorded + i as u64) % RECENT_QUERIES as u64) as u32;
        data.recents = kept.iter().enumerate().map(|(i, token)| (*token as u32, slot(i))).collect();
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
    fn slots(&self, data: &mut PlanData, new: &[u32]) -> Result<()> {
        let mut taken: Vec<bool> = self.places.slot_cell.iter().map(|c| *c != NOWHERE).collect();
        let mut leaves = vec![false; new.len()];
        let seals = data.changes.iter().filter_map(|c| if let Change::Seal { filling, .. } = c { Some(filling) } else { None });
        seals.flat_map(|filling| &filling.rows).for_each(|row| match row.source {
            Source::Slot(slot) => taken[slot] = false,
            Source::Token(token) => leaves[token] = true,
            Source::Coded(_) => {}
        });
        let mut free = (0..taken.len()).filter(|slot| !taken[*slot]);
        for (cell, leaves) in new.iter().zip(leaves) {
            let slot = if leaves { None } else { Some(free.next().ok_or_else(|| self.no_slot())?) };
            data.tokens.push((*cell, slot.map_or(-1, |s| s as i32)));
        }
        Ok(())
    }

    fn no_slot(&self) -> Error {
        Error::Full(format!("all {} exact slots are taken by {} sequences", self.places.slot_cell.len(), self.geometry.config.n_seqs))
    }
}
