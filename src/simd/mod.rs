//! Vector kernels behind run-time dispatch. The granularity is a row or a tile, never an element.
//!
//! What is computed stands once, over what an instruction set has for it: floats in [`dense`], coding in `encode`, tiles of codes in `tiles_float` and
//! `tiles_whole`. What that is has a file for each set: `portable` for any target, `avx2`, `avx512`, and `vnni` for AVX-512 that multiplies bytes.
//! `kernels` lists the kernels and compiles them for each [`Level`]; this file chooses one. `SPECTRAL_KV_CPU_LEVEL` (`portable`, `avx2`, `avx512`,
//! `avx512vnni`) may lower the level, never raise it. Sums run in a fixed order per level, so results repeat; levels differ in the last bits. Must not
//! know about bases, cells or arenas: it sees slices.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dense;
mod encode;
mod kernels;
pub mod lanes;
mod memory;
mod portable;
mod products;
#[cfg(test)]
mod tests;
mod tiles_float;
mod tiles_whole;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use dense::{MatMut, MatRef};
pub use encode::code_row;
pub use kernels::Kernels;
pub use memory::{Ahead, Lines};
pub use products::{Pass, Products, Projected, BATCH};

use std::sync::OnceLock;

/// An instruction-set level, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with VNNI and VBMI.
    Avx512Vnni,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Vnni];

    /// Its name in `SPECTRAL_KV_CPU_LEVEL`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
        }
    }
    /// Whether its tiles are computed in whole numbers of 16 bits, not in f32.
    #[cfg(test)]
    pub(crate) fn rounds_to_16_bits(self) -> bool {
        !matches!(self, Level::Avx512)
    }
}

/// The kernels of a level, or `None` when this CPU lacks it.
pub fn at(level: Level) -> Option<&'static Kernels> {
    match level {
        Level::Portable => Some(&kernels::PORTABLE),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")).then_some(&kernels::AVX2)
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (at(Level::Avx2).is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq"))
        .then_some(&kernels::AVX512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni => (at(Level::Avx512).is_some() && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi"))
            .then_some(&kernels::AVX512_VNNI),
        #[cfg(not(target_arch = "x86_64"))]
        _ => None,
    }
}

/// The best kernels of this CPU, or those of the lower level that `SPECTRAL_KV_CPU_LEVEL` names.
pub fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let named = std::env::var("SPECTRAL_KV_CPU_LEVEL").ok().and_then(|name| Level::ALL.into_iter().find(|l| l.name() == name));
        let most = named.unwrap_or(Level::Avx512Vnni);
        Level::ALL.into_iter().rev().filter(|l| *l <= most).find_map(at).unwrap_or(&kernels::PORTABLE)
    })
}

/// Tiles in f32 without intrinsics: what every level is compared with.
#[cfg(test)]
pub(crate) fn plain() -> &'static Kernels {
    &kernels::PLAIN
}
