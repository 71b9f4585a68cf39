//! The cache: which row is where, and what is done with the rows.
//!
//! [`Table`] (host side of a stream) makes [`plan`]s; [`Layer`] carries them out on [`arena`]s that the caller owns; [`Cache`]
//! owns all three for a plain user. Must not know about C or llama.cpp.

pub mod arena;
mod attend;
mod handle;
mod layer;
pub mod plan;
mod prefill;
mod table;

pub use attend::Call;
pub use handle::Cache;
pub use layer::{HeadMut, Layer, Mask, Rows, Stats};
pub use plan::Plan;
pub use table::{Cells, Location, Restore, Table};
