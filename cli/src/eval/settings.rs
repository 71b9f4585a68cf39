//! The settings that are compared: their names, the caches behind them, and what they hold.
//!
//! Must not know what is measured on them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::probe::{Cache, LayerInfo, Side};

use super::codec::Codec;

/// All settings that are compared unless a list is given.
pub const DEFAULT: &str =
    "f16,rounding+window,q8_0,q4_0,q4_0-norot,q8_0+window,q4_0+window,q4_0-norot+window,turbo4+window,turbo3+window,turbo2+window,\
                           prototype+window,spectral-4,spectral-8,spectral-8-flat,spectral-12.8,spectral-4b-flat,spectral-3b-flat,spectral-2b-flat";

/// Quantised types that llama.cpp stores a KV cache in.
const STOCK_TYPES: [&str; 6] = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"];

/// What holds the rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// llama.cpp as it ships.
    Stock {
        /// Type of K and V.
        ggml_type: String,
        /// Hadamard rotation, llama.cpp's default for quantised types.
        rotate: bool,
    },
    /// A stock f16 cache whose rows behind the exact window are replaced.
    Simulated {
        /// What they are replaced by.
        codec: Codec,
        /// Which of them.
        part: Part,
    },
    /// The spectral cache.
    Spectral {
        /// f16 bytes over bytes held.
        ratio: f32,
        /// Code bits per element; 0 where the ratio decides.
        bits: f32,
        /// All rows at one rate, as if all were old: what young rows gain from rates by age is not in the numbers.
        flat: bool,
    },
}

/// A part of a cache: all of it, or one layer, or one side, or one side of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Part {
    layer: Option<usize>,
    side: Option<Side>,
}

impl Part {
    /// Reads a layer's number with or without `k` or `v` behind it, or one of these alone.
    fn named(name: &str) -> Option<Self> {
        let (layer, side) = match name.strip_suffix(['k', 'v']) {
            Some(layer) => (layer, Some(if name.ends_with('k') { Side::K } else { Side::V })),
            None => (name, None),
        };
        let layer = if layer.is_empty() { None } else { Some(layer.parse().ok()?) };
        (layer.is_some() || side.is_some()).then_some(Self { layer, side })
    }

    /// Whether it has these rows.
    pub fn has(&self, layer: usize, side: Side) -> bool {
        self.layer.is_none_or(|l| l == layer) && self.side.is_none_or(|s| s == side)
    }
}

/// A named setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// As on the command line.
    pub name: String,
    /// What it means.
    pub kind: Kind,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let kind = if let Some((codec, part)) = name.split_once("+window") {
            let codec = Codec::named(codec).ok_or_else(|| format!("`{codec}` cannot be simulated behind a window"))?;
            let no_part = || format!("`{name}`: behind +window there can be @LAYER, @k, @v, @LAYERk or @LAYERv");
            let part = match part {
                "" => Part::default(),
                part => part.strip_prefix('@').and_then(Part::named).ok_or_else(no_part)?,
            };
            Kind::Simulated { codec, part }
        } else if let Some(rate) = name.strip_prefix("spectral-") {
            let (rate, flat) = rate.strip_suffix("-flat").map_or((rate, false), |r| (r, true));
            let (rate, is_bits) = rate.strip_suffix('b').map_or((rate, false), |r| (r, true));
            match (rate.parse::<f32>(), is_bits) {
                // The ratio stays at its default, which the bits overrule.
                (Ok(bits), true) if bits > 0.0 && bits <= 8.0 => Kind::Spectral { ratio: 8.0, bits, flat },
                (Ok(ratio), false) if ratio > 1.0 && ratio <= 64.0 => Kind::Spectral { ratio, bits: 0.0, flat },
                _ => {
                    return Err(format!("`{name}`: expected spectral-RATIO (above 1, at most 64) or spectral-BITSb (at most 8), then perhaps -flat"))
                }
            }
        } else {
            let (ggml_type, rotate) = name.strip_suffix("-norot").map_or((name, true), |t| (t, false));
            if !(name == "f16" || STOCK_TYPES.contains(&ggml_type)) {
                return Err(format!("there is no setting `{name}`; the default list is {DEFAULT}"));
            }
            Kind::Stock { ggml_type: ggml_type.into(), rotate }
        };
        Ok(Self { name: name.into(), kind })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Setting {
    /// The setting that all others are compared with.
    pub fn reference() -> Self {
        Self { name: "f16".into(), kind: Kind::Stock { ggml_type: "f16".into(), rotate: true } }
    }

    /// The cache that llama.cpp opens for it.
    pub fn cache(&self, window: usize) -> Cache {
        match &self.kind {
            Kind::Stock { ggml_type, rotate } => Cache::Stock { k: ggml_type.clone(), v: ggml_type.clone(), rotate: *rotate },
            Kind::Simulated { .. } => Setting::reference().cache(window),
            Kind::Spectral { ratio, bits, flat } => {
                Cache::Spectral { ratio: *ratio, bits: *bits, window: window as u32, fine: flat.then_some(0), basis: None }
            }
        }
    }

    /// The codec that is simulated, if one is, and for which rows.
    pub fn simulated(&self) -> Option<(Codec, Part)> {
        match self.kind {
            Kind::Simulated { codec, part } => Some((codec, part)),
            _ => None,
        }
    }

    /// Settings that differ in nothing but their size have the same family; unquantised caches and parts of a cache have none.
    pub fn family(&self) -> Option<String> {
        let rotation = |rotate: bool| if rotate { "" } else { "-norot" };
        match &self.kind {
            Kind::Stock { ggml_type, .. } if ggml_type == "f16" => None,
            Kind::Stock { rotate, .. } => Some(format!("stock{}", rotation(*rotate))),
            Kind::Simulated { part, .. } if *part != Part::default() => None,
            Kind::Simulated { codec, .. } => Some(match codec {
                Codec::Q8 { rotate } | Codec::Q4 { rotate } => format!("stock{}+window", rotation(*rotate)),
                Codec::Turbo { .. } => "turbo+window".into(),
                Codec::Prototype => "prototype+window".into(),
                Codec::Rounding => return None,
            }),
            Kind::Spectral { flat, .. } => Some(if *flat { "spectral-flat" } else { "spectral" }.into()),
        }
    }

    /// Code bits of an element of a stock cache, without the steps of its blocks.
    pub fn stock_code_bits(&self) -> f64 {
        match &self.kind {
            Kind::Stock { ggml_type, .. } if ggml_type != "f16" => ggml_type.chars().find_map(|c| c.to_digit(10)).map_or(16.0, f64::from),
            _ => 16.0,
        }
    }

    /// One word for where the numbers come from.
    pub fn origin(&self) -> &'static str {
        match self.kind {
            Kind::Stock { .. } => "stock",
            Kind::Simulated { .. } => "simulated",
            Kind::Spectral { .. } => "spectral",
        }
    }
}

/// What a cache holds for a context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Holding {
    /// All bytes.
    pub bytes: f64,
    /// Code bits per element.
    pub code_bits: f64,
}

/// What a simulated codec would hold at its best: rows of the sinks, the window and the block being filled in f16, and those that
/// are not of its part; all others coded.
pub fn nominal((codec, part): (Codec, Part), layers: &[LayerInfo], ctx: usize, window: usize, sinks: usize) -> Holding {
    let exact = ctx.min(window + sinks + codec.rows()) as f64;
    let (mut bits, mut code_bits, mut elements) = (0.0, 0.0, 0.0);
    for (l, layer) in layers.iter().enumerate() {
        for (side, d) in [(Side::K, layer.d_k), (Side::V, layer.d_v)] {
            let heads = layer.n_head_kv as f64;
            let f16 = 16.0 * d as f64;
            let (all, codes) = if part.has(l, side) { (codec.all_bits(side, d), codec.code_bits(side, d)) } else { (f16, f16) };
            bits += heads * (exact * f16 + (ctx as f64 - exact) * all);
            code_bits += heads * codes;
            elements += heads * d as f64;
        }
    }
    Holding { bytes: bits / 8.0, code_bits: code_bits / elements }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let kind = |name: &str| name.parse::<Setting>().map(|s| s.kind);
        assert_eq!(kind("q4_0-norot"), Ok(Kind::Stock { ggml_type: "q4_0".into(), rotate: false }));
        assert_eq!(kind("q4_0-norot+window"), Ok(Kind::Simulated { codec: Codec::Q4 { rotate: false }, part: Part::default() }));
        let turbo = |layer, side| Ok(Kind::Simulated { codec: Codec::Turbo { bits: 3 }, part: Part { layer, side } });
        assert_eq!(kind("turbo3+window"), turbo(None, None));
        assert_eq!(kind("turbo3+window@12"), turbo(Some(12), None));
        assert_eq!(kind("turbo3+window@v"), turbo(None, Some(Side::V)));
        assert_eq!(kind("turbo3+window@0k"), turbo(Some(0), Some(Side::K)));
        assert_eq!(kind("spectral-12.8"), Ok(Kind::Spectral { ratio: 12.8, bits: 0.0, flat: false }));
        assert_eq!(kind("spectral-2b"), Ok(Kind::Spectral { ratio: 8.0, bits: 2.0, flat: false }));
        assert_eq!(kind("spectral-4-flat"), Ok(Kind::Spectral { ratio: 4.0, bits: 0.0, flat: true }));
        for wrong in [
            "",
            "f16+window",
            "f16-norot",
            "turbo3",
            "q9_0",
            "spectral-1",
            "spectral-x",
            "spectral-9b",
            "spectral-nan",
            "turbo3+window@",
            "turbo3+window3",
            "turbo3+window@x",
        ] {
            assert!(kind(wrong).is_err(), "{wrong}");
        }
        for name in DEFAULT.split(',') {
            assert_eq!(name.parse::<Setting>().unwrap().name, name);
        }
    }

    #[test]
    fn families_differ_in_size_only() {
        let family = |name: &str| name.parse::<Setting>().unwrap().family();
        assert_eq!(family("f16"), None);
        assert_eq!(family("q8_0+window"), family("q4_0+window"));
        assert_ne!(family("q4_0+window"), family("q4_0-norot+window"));
        assert_ne!(family("spectral-8"), family("spectral-8-flat"));
        assert_eq!(family("turbo3+window@1"), None);
    }

    #[test]
    fn nominal_sizes_are_those_of_the_formats() {
        let layers = [LayerInfo { n_head: 4, n_head_kv: 2, d_k: 128, d_v: 128, scale: 0.0, softcap: 0.0, rope: None }];
        let nominal = |codec, ctx, window, sinks| super::nominal((codec, Part::default()), &layers, ctx, window, sinks);
        // Without exact rows a q4_0 row of 128 elements has 4 blocks of 18 bytes.
        let q4 = nominal(Codec::Q4 { rotate: true }, 1000, 0, 0);
        assert_eq!(q4.bytes, (64 * 2 * 2 * 256 + 936 * 2 * 2 * 4 * 18) as f64);
        assert_eq!(q4.code_bits, 4.0);
        let exact = nominal(Codec::Turbo { bits: 2 }, 100, 128, 4);
        assert_eq!(exact.bytes, (100 * 2 * 2 * 256) as f64);
        // Rank 16 of 128 and 32 of 128 in int8.
        assert_eq!(nominal(Codec::Prototype, 4096, 128, 4).code_bits, 1.5);
        // The values alone.
        let values = super::nominal((Codec::Q4 { rotate: true }, Part { layer: None, side: Some(Side::V) }), &layers, 1000, 0, 0);
        assert_eq!((values.bytes, values.code_bits), ((1000 * 2 * 256 + 64 * 2 * 256 + 936 * 2 * 4 * 18) as f64, 10.0));
    }
}
