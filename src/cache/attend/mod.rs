//! Attention of one layer over its arena, as the plan says: which rows, which of them are seen, in which pieces.
//!
//! Steps of up to 64 tokens attend to the codes ([`decode`]), longer ones to rows that are rebuilt a tile at a time ([`prefill`]); both look at the
//! blocks of one [`seating`]. Must not know how scores are computed, nor about threads.

mod decode;
mod prefill;
mod seating;

use super::arena::AllBases;
use super::head::Head;
use super::input::Rows;
use super::layer::Layer;
use super::mask::{Mask, Seen};
use super::plan::Plan;
use crate::attention::prefill::{Prefill, Rebuilder, RowBlock, STEP};
use crate::attention::{Accumulator, HeadBases};
use crate::config::Scoring;
use crate::error::{Error, Result};
use crate::layout::TILE;
use crate::rope::Turn;
use crate::simd::Lines;
use std::cell::RefCell;

/// One attention call.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// The stream's bytes.
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

impl Call<'_> {
    /// Refuse what does not belong together.
    fn check(&self, layer: &Layer) -> Result<()> {
        layer.check_rows(self.plan, &[self.k, self.v])?;
        self.scoring.check()?;
        layer.check_arena(self.arena)
    }

    /// Refuse queries of a KV head's group that are not finite.
    fn check_queries(&self, layer: &Layer, head: usize, mut tokens: impl Iterator<Item = usize>) -> Result<()> {
        let (group, d) = (layer.shape().group(), layer.shape().d_k);
        match tokens.find(|t| !(0..group).all(|a| self.q.is_finite(*t, head * group + a, d))) {
            Some(t) => Err(Error::NotFinite(format!("query of token {t}, KV head {head}, in f16"))),
            None => Ok(()),
        }
    }

    /// A KV head; its bases go to the scratch.
    fn head<'a>(&'a self, layer: &'a Layer, index: usize, s: &mut Scratch) -> Result<Head<'a>> {
        let head = Head::new(layer, index, self.arena, self.plan)?;
        head.read_bases(self.plan, &mut s.bases)?;
        Ok(head)
    }
}

/// Memory of a thread that both ways of attention work in.
#[derive(Default)]
struct Scratch {
    bases: AllBases<HeadBases>,
    turn: Turn,
    /// For each tile of a batch, or each block of a step of prefill: what is seen of it.
    masks: Vec<f32>,
    /// For each tile of a batch: turns of its rows.
    turns: Vec<[i32; TILE]>,
    rows_k: Lines,
    rows_v: Lines,
    accumulator: Accumulator,
    rebuilder: Rebuilder,
    prefill: Prefill,
    blocks: [RowBlock; STEP],
    row: Vec<f32>,
    /// What the tokens of a piece of prefill see of each block: heads see alike.
    seen: Vec<Option<Seen>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}
