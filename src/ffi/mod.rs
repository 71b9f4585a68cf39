//! The C interface. All raw pointers of the library are here; every export catches panics and NULL.
//!
//! One file per C type, of which C sees pointers only: [`cache`](skv_cache) for `include/spectral_kv.h`; [`geometry`](skv_geometry),
//! [`calibration`](skv_calibration), [`table`](skv_table), [`layer`](skv_layer) with its `step`, and `state` for `include/spectral_kv_llama.h`;
//! [`cuda`](skv_cuda_device) for `include/spectral_kv_cuda.h`. Beside them `types` (structs of the first two headers), `error` (statuses and their text),
//! `object` (what an object is once a call on it has panicked) and `pointer` (checks of pointers and structs). Exports check, convert and call; but how
//! threads share the work of a call is decided here, too.

mod cache;
mod calibration;
mod cuda;
mod error;
mod geometry;
mod layer;
mod object;
mod pointer;
mod state;
mod step;
mod table;
mod types;

pub use cache::*;
pub use calibration::*;
pub use cuda::*;
pub use error::*;
pub use geometry::*;
pub use layer::*;
pub use state::*;
pub use step::*;
pub use table::*;
pub use types::*;

#[cfg(test)]
use pointer::Struct;
