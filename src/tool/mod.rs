//! The parts of the command-line tool. None of them calls the library: they build it into llama.cpp
//! and look at what llama.cpp then does.

pub mod build;
pub mod cmd;
pub mod demo;
pub mod fetch;
pub mod fsutil;
pub mod layout;
pub mod probe;
pub mod report;
pub mod toolchain;
pub mod tree;
