//! The parts of the command-line tool. They do not call the library, but build it into llama.cpp and look at
//! what llama.cpp then does; only `calibrate` has it analyse rows, and `eval` takes its rotary frame from it, for a baseline.

pub mod bench;
pub mod build;
pub mod calibrate;
pub mod cmd;
pub mod demo;
pub mod diff;
pub mod eval;
pub mod fetch;
pub mod fsutil;
pub mod judge;
pub mod law;
pub mod layout;
pub mod llama;
pub mod model;
pub mod probe;
pub mod progress;
pub mod random;
pub mod report;
pub mod rope;
pub mod text;
pub mod texts;
pub mod toolchain;
pub mod tree;
