//! spectral-kv: llama.cpp's KV cache at an eighth of the memory, stored spectrally and attended to from the codes.
//!
//! Keys are kept in the rotary frame of the stretch of positions that their tile is in, keys and values are transformed per head
//! and layer and quantised with bits that are shared out over the whole model, and attention works on the codes.
//!
//! A C program, llama.cpp among them, sees [`ffi`] alone, through the headers in `include`. In Rust, and to the tests, [`cache`] is
//! what there is to call, with [`config`] for what a user asks for, [`rope`], [`error`], and [`state`] to save and restore rows;
//! [`codec::calibration`] is what the command `calibrate` writes. What else is in [`codec`], [`layout`] and [`simd`] is public
//! for the golden values of the tests and for the benchmarks, which look at single steps, and promises nothing to others.

#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

#[deny(unsafe_code)]
mod attention;
#[deny(unsafe_code)]
pub mod cache;
#[deny(unsafe_code)]
pub mod codec;
#[deny(unsafe_code)]
pub mod config;
pub mod cuda;
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
