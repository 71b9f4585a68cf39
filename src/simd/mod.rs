//! Vector kernels behind run-time dispatch. The granularity is a row or a tile, never an element.
//!
//! What is computed stands once, over what an instruction set has for it: floats in [`dense`], coding in `encode`, tiles of codes in `tiles_float`
//! and `tiles_whole`. What that is has a file for each set: `portable` for any target, `avx2`, `avx512`, `vnni` for AVX-512 that multiplies bytes,
//! and `neon`. `kernels` lists the kernels and compiles them for each [`Level`]; this file chooses one: the best that the CPU has, or what
//! `SPECTRAL_KV_CPU_LEVEL` names (`portable`, `avx2`, `avx512`, `avx512vnni`, `neon`). A name that is none of these, or one of a level that the CPU
//! lacks, is an error. Sums run in a fixed order per level, so results repeat; levels differ in the last bits. Must not know about bases, cells or
//! arenas: it sees slices.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dense;
mod encode;
mod kernels;
pub mod lanes;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod products;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only a level of x86 projects in words"))]
mod projection;
#[cfg(test)]
mod tests;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only a level of x86 takes this way for all tiles"))]
mod tiles_float;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only levels of x86 add something to those of codes"))]
mod tiles_whole;
#[cfg(target_arch = "x86_64")]
mod vnni;

pub use dense::{MatMut, MatRef};
pub use encode::code_row;
pub use kernels::Kernels;
pub use memory::{ask_for, Ahead, Lines};
pub use products::{Pass, Products, Projected, BATCH};
pub use projection::Projection;

use crate::error::{Error, Result};
use std::sync::OnceLock;

/// An instruction-set level, lowest first among those of an architecture.
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
    /// NEON with dot products of bytes, FEAT_DotProd.
    Neon,
}

impl Level {
    /// All levels, lowest first among those of an architecture.
    pub const ALL: [Level; 5] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Vnni, Level::Neon];

    /// Its name in `SPECTRAL_KV_CPU_LEVEL`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Vnni => "avx512vnni",
            Level::Neon => "neon",
        }
    }
    /// What rounding of factors to 16 bits may do to attention, relative: queries' coefficients, and the queries themselves before that.
    #[cfg(test)]
    pub(crate) fn rounding(self) -> f64 {
        match self {
            Level::Portable | Level::Avx2 | Level::Neon => 1e-4,
            Level::Avx512 => 2e-6,
            Level::Avx512Vnni => 2e-4,
        }
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
        #[cfg(target_arch = "aarch64")]
        Level::Neon => std::arch::is_aarch64_feature_detected!("dotprod").then_some(&kernels::NEON),
        // Those of other architectures.
        _ => None,
    }
}

/// What names a level that is to be used instead of the best.
const VARIABLE: &str = "SPECTRAL_KV_CPU_LEVEL";

/// The best kernels of this CPU.
fn best() -> &'static Kernels {
    Level::ALL.into_iter().rev().find_map(at).unwrap_or(&kernels::PORTABLE)
}

/// The kernels of the level that is asked for by name, the best if none is. What cannot be had is refused: who measures or tests a level wants no other.
fn choose(name: Option<&str>) -> Result<&'static Kernels> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(best()) };
    let fail = |why: String| Err(Error::Config(format!("{VARIABLE}={name}: {why}")));
    let Some(level) = Level::ALL.into_iter().find(|level| level.name() == name) else {
        return fail(format!("no such level; there are {}", Level::ALL.map(Level::name).join(", ")));
    };
    match at(level) {
        Some(kernels) => Ok(kernels),
        None => fail(format!("this CPU has no more than {}", best().level.name())),
    }
}

fn chosen() -> &'static Result<&'static Kernels> {
    static CHOSEN: OnceLock<Result<&'static Kernels>> = OnceLock::new();
    CHOSEN.get_or_init(|| choose(std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned()).as_deref()))
}

/// Refuse a level in `SPECTRAL_KV_CPU_LEVEL` that cannot be had. Whatever a cache needs first asks this.
pub fn check_level() -> Result<()> {
    chosen().clone().map(|_| ())
}

/// The best kernels of this CPU, or those of the level that `SPECTRAL_KV_CPU_LEVEL` names, looked at once in a process. What [`check_level`] refuses
/// changes nothing here.
pub fn kernels() -> &'static Kernels {
    chosen().as_ref().copied().unwrap_or_else(|_| best())
}

/// Tiles in f32 without intrinsics: what every level is compared with.
#[cfg(test)]
pub(crate) fn plain() -> &'static Kernels {
    &kernels::PLAIN
}
