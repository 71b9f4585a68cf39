//! The cache: which row is where, and what is done with the rows.
//!
//! [`Geometry`] says how large everything is and where it lies; [`Table`] (host side of a stream) makes [`plan`]s; [`Layer`] carries them out on [`arena`]s that the
//! caller owns; [`Cache`] owns all of these for a plain user. Must not know about C or llama.cpp.

pub mod arena;
mod attend;
pub mod findings;
mod fit;
mod handle;
mod head;
mod input;
mod layer;
mod mask;
pub mod plan;
mod rebuild;
mod sample;
mod stats;
mod store;
mod table;

pub use crate::layout::geometry::{Geometry, SizeReport};
pub use attend::Call;
pub use findings::Findings;
pub use handle::Cache;
pub use input::{Rows, Step};
pub use layer::Layer;
pub use mask::Mask;
pub use plan::Plan;
pub use stats::Stats;
pub use table::{Cells, Location, Restore, Table};
