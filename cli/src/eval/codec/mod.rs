//! Codecs that llama.cpp does not have, or does not have behind an exact window: a row of an f16 cache is replaced
//! by what would be left of it.
//!
//! Owns their names, nominal sizes and the walk over heads. Must not know when rows are replaced.

mod blocks;
mod hadamard;
mod truncated;
mod turbo;

use anyhow::Result;
use half::f16;
use spectral_kv::rope::Rope;

use crate::probe::{LayerInfo, Side};
use turbo::Turbo;

/// What a simulated codec is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Codec {
    /// ggml's q8_0, with llama.cpp's Hadamard rotation or without.
    Q8 {
        /// Rotated before.
        rotate: bool,
    },
    /// ggml's q4_0.
    Q4 {
        /// Rotated before.
        rotate: bool,
    },
    /// TurboQuant at 1 to 4 bits.
    Turbo {
        /// Bits of an element.
        bits: u32,
    },
    /// Rank 16 and 32, int8.
    Prototype,
    /// f16, each number replaced by its neighbour: what the smallest change does.
    Rounding,
}

impl Codec {
    /// The codec of a setting's name, without its `+window`.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "q8_0" => Codec::Q8 { rotate: true },
            "q8_0-norot" => Codec::Q8 { rotate: false },
            "q4_0" => Codec::Q4 { rotate: true },
            "q4_0-norot" => Codec::Q4 { rotate: false },
            "turbo1" => Codec::Turbo { bits: 1 },
            "turbo2" => Codec::Turbo { bits: 2 },
            "turbo3" => Codec::Turbo { bits: 3 },
            "turbo4" => Codec::Turbo { bits: 4 },
            "prototype" => Codec::Prototype,
            "rounding" => Codec::Rounding,
            _ => return None,
        })
    }

    /// Rows that are coded together.
    pub fn rows(&self) -> usize {
        match self {
            Codec::Prototype => truncated::ROWS,
            _ => 64,
        }
    }

    /// Bits of the codes of a head's row alone.
    pub fn code_bits(&self, side: Side, d: usize) -> f64 {
        match self {
            Codec::Q8 { .. } => 8.0 * d as f64,
            Codec::Q4 { .. } => 4.0 * d as f64,
            Codec::Turbo { bits } => f64::from(*bits) * d as f64,
            Codec::Prototype => 8.0 * rank(side).min(d) as f64,
            Codec::Rounding => 16.0 * d as f64,
        }
    }

    /// Bits of a head's row with all that is needed to read it: steps, norms, and a row's share of the bases (f16).
    pub fn all_bits(&self, side: Side, d: usize) -> f64 {
        let side_data = match self {
            Codec::Q8 { .. } | Codec::Q4 { .. } => 16.0 * (d / blocks::BLOCK) as f64,
            Codec::Turbo { .. } => 16.0,
            Codec::Rounding => 0.0,
            Codec::Prototype => (16.0 * (rank(side).min(d) * d) as f64 + 32.0) / truncated::ROWS as f64,
        };
        self.code_bits(side, d) + side_data
    }
}

fn rank(side: Side) -> usize {
    match side {
        Side::K => truncated::RANK_K,
        Side::V => truncated::RANK_V,
    }
}

/// A codec with its tables, for the layers of one model.
pub struct Coder {
    codec: Codec,
    turbo: Option<Turbo>,
}

impl Coder {
    /// Builds the tables.
    pub fn new(codec: Codec) -> Self {
        let turbo = match codec {
            Codec::Turbo { bits } => Some(Turbo::new(bits)),
            _ => None,
        };
        Self { codec, turbo }
    }

    /// Replaces the rows `[row][head][d]` from position `first` on. `rope` is how the keys of this layer are rotated.
    pub fn round_trip(&self, layer: &LayerInfo, side: Side, rope: &Rope, first: usize, rows: &mut [f32]) -> Result<()> {
        let (d, size) = match side {
            Side::K => (layer.d_k, hadamard::size_k(layer.d_k)),
            Side::V => (layer.d_v, hadamard::size_v(layer.d_v)),
        };
        match self.codec {
            Codec::Q8 { rotate } => each_head(rows, d, size.filter(|_| rotate), blocks::q8_0),
            Codec::Q4 { rotate } => each_head(rows, d, size.filter(|_| rotate), blocks::q4_0),
            Codec::Turbo { .. } => rows.chunks_exact_mut(d).for_each(|head| {
                if let Some(turbo) = &self.turbo {
                    turbo.round_trip(head);
                }
            }),
            Codec::Rounding => rows.iter_mut().for_each(|x| *x = neighbour(*x)),
            Codec::Prototype => {
                let rope = matches!(side, Side::K).then_some(rope);
                for h in 0..layer.n_head_kv {
                    let mut head: Vec<&mut [f32]> = rows.chunks_exact_mut(d).skip(h).step_by(layer.n_head_kv).collect();
                    truncated::round_trip(&mut head, rank(side), rope, first)?;
                }
            }
        }
        Ok(())
    }
}

/// The f16 number that differs in the last bit.
fn neighbour(x: f32) -> f32 {
    f16::from_bits(f16::from_f32(x).to_bits() ^ 1).to_f32()
}

fn each_head(rows: &mut [f32], d: usize, rotation: Option<usize>, quantise: fn(&mut [f32])) {
    for head in rows.chunks_exact_mut(d) {
        match rotation {
            Some(size) => {
                hadamard::rotate(head, size);
                quantise(head);
                hadamard::rotate(head, size);
            }
            None => quantise(head),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_is_next_and_mutual() {
        for x in [1.0f32, -0.3, 1000.0, 6e-8, 0.0] {
            let (x, y) = (f16::from_f32(x), neighbour(x));
            assert!((y - x.to_f32()).abs() <= x.to_f32().abs() / 1024.0 + 6e-8 && y != x.to_f32() && neighbour(y) == x.to_f32(), "{x} {y}");
        }
    }
}
