//! The parts of the command-line tool. But for `calibrate` none of them calls the library: they build it into llama.cpp
//! and look at what llama.cpp then does.

pub mod build;
pub mod calibrate;
pub mod cmd;
pub mod demo;
pub mod diff;
pub mod fetch;
pub mod fsutil;
pub mod layout;
#[expect(dead_code, reason = "one client for every comparison; no single one of them needs all of it")]
pub mod probe;
pub mod report;
pub mod toolchain;
pub mod tree;
