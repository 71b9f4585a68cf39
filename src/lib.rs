//! spectral-kv: llama.cpp's KV cache at an eighth of the memory, stored spectrally and attended to from the codes.
//!
//! Keys are kept in the rotary frame of their tile of 64 rows, keys and values are transformed per head and layer, quantised
//! under one bit budget per layer, and decode attention works on the codes. See [`codec`] for the format of a tile, [`cache`]
//! for where rows live, [`attention`] for the arithmetic and the headers in `include` for the C interface.

#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

#[deny(unsafe_code)]
pub mod attention;
#[deny(unsafe_code)]
pub mod cache;
#[deny(unsafe_code)]
pub mod codec;
#[deny(unsafe_code)]
pub mod config;
#[deny(unsafe_code)]
pub mod error;
pub mod ffi;
#[deny(unsafe_code)]
pub mod layout;
#[deny(unsafe_code)]
pub mod rope;
pub mod simd;
#[deny(unsafe_code)]
pub mod state;
