//! The models to measure with: Llamas of random weights. What stock llama.cpp does is the same for all weights; how a spectral
//! cache spreads its bits is not.
//!
//! Owns their shapes, names and weights. Must not know how a file is laid out.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::gguf::{self, Kind, Tensor, Value};
use crate::fsutil;
use crate::layout::Layout;
use crate::random::Random;

/// What decides over the bytes: a file made by other sources has another name.
const SOURCES: [&str; 3] = [include_str!("gguf.rs"), include_str!("model.rs"), include_str!("../random.rs")];

/// A Llama.
pub struct Shape {
    /// What a user calls it.
    pub name: &'static str,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    embedding: usize,
    feed_forward: usize,
    vocabulary: usize,
    /// Of the matrices; norms are f32, embeddings f16.
    weights: Kind,
}

/// Nearly all of its time is attention.
pub static ATTENTION: Shape =
    Shape { name: "attention", layers: 4, heads: 32, kv_heads: 8, head: 128, embedding: 512, feed_forward: 256, vocabulary: 512, weights: Kind::F16 };

/// Four layers of an 8B Llama: what attention is in a real model.
pub static EIGHT_B: Shape = Shape { name: "8b", embedding: 4096, feed_forward: 14336, weights: Kind::Q4_0, ..ATTENTION };

impl Shape {
    /// Its parts in words.
    pub fn description(&self) -> String {
        format!(
            "random Llama, {} layers, {}/{} heads of {}, embedding {}, feed-forward {}, {:?}",
            self.layers, self.heads, self.kv_heads, self.head, self.embedding, self.feed_forward, self.weights
        )
    }

    fn metadata(&self) -> Vec<(&'static str, Value)> {
        let n = |x: usize| Value::U32(x as u32);
        vec![
            ("general.architecture", Value::Text("llama")),
            ("llama.context_length", n(131_072)),
            ("llama.embedding_length", n(self.embedding)),
            ("llama.block_count", n(self.layers)),
            ("llama.feed_forward_length", n(self.feed_forward)),
            ("llama.attention.head_count", n(self.heads)),
            ("llama.attention.head_count_kv", n(self.kv_heads)),
            ("llama.attention.key_length", n(self.head)),
            ("llama.attention.value_length", n(self.head)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.dimension_count", n(self.head)),
            ("llama.rope.freq_base", Value::F32(500_000.0)),
            ("llama.vocab_size", n(self.vocabulary)),
            ("tokenizer.ggml.model", Value::Text("no_vocab")),
        ]
    }

    fn tensors(&self) -> Vec<Tensor> {
        let (d, ff, q, kv) = (self.embedding, self.feed_forward, self.heads * self.head, self.kv_heads * self.head);
        let norm = |name: String| Tensor { name, columns: d, rows: 1, kind: Kind::F32 };
        let mut all =
            vec![Tensor { name: "token_embd.weight".into(), columns: d, rows: self.vocabulary, kind: Kind::F16 }, norm("output_norm.weight".into())];
        for i in 0..self.layers {
            all.extend(["attn_norm", "ffn_norm"].map(|name| norm(format!("blk.{i}.{name}.weight"))));
            let matrices = [
                ("attn_q", d, q),
                ("attn_k", d, kv),
                ("attn_v", d, kv),
                ("attn_output", q, d),
                ("ffn_gate", d, ff),
                ("ffn_up", d, ff),
                ("ffn_down", ff, d),
            ];
            let matrix = |(name, columns, rows)| Tensor { name: format!("blk.{i}.{name}.weight"), columns, rows, kind: self.weights };
            all.extend(matrices.map(matrix));
        }
        all
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let mut random = Random::new(0, 0);
        gguf::write(out, &self.metadata(), &self.tensors(), |t, row| {
            if t.name.ends_with("norm.weight") {
                row.fill(1.0);
            } else {
                let deviation = (t.columns as f32).sqrt().recip();
                row.iter_mut().for_each(|x| *x = deviation * normal(&mut random));
            }
        })
    }

    /// Its file, made on the first call.
    pub fn file(&self, layout: &Layout) -> Result<PathBuf> {
        let dir = layout.models();
        let made_by = fsutil::sha256_of(&SOURCES.map(str::as_bytes));
        let path = dir.join(format!("{}-{}.gguf", self.name, &made_by[..8]));
        if path.is_file() {
            return Ok(path);
        }
        let why = || format!("cannot write {}", path.display());
        eprintln!("making the model {}", path.display());
        fs::create_dir_all(&dir).with_context(why)?;
        // Under a name of its own until it is complete.
        let part = path.with_extension(format!("part-{}", std::process::id()));
        let mut out = BufWriter::new(File::create(&part).with_context(why)?);
        self.write(&mut out).and_then(|()| out.flush()).with_context(why)?;
        fs::rename(&part, &path).with_context(why)?;
        remove_others(&dir, &path, self.name)?;
        Ok(path)
    }
}

/// Removes files of the model that other sources made: they are large, and nothing will read them again.
fn remove_others(dir: &Path, kept: &Path, name: &str) -> Result<()> {
    for file in fsutil::files(dir, &|_| false)? {
        let path = dir.join(&file);
        let is_ours = file.extension().is_some_and(|e| e == "gguf") && file.to_string_lossy().starts_with(&format!("{name}-"));
        if is_ours && path != kept {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Nearly normal, of deviation 1: four uniform numbers have a variance of a third. Cheap, as there are nearly a thousand million to draw.
fn normal(random: &mut Random) -> f32 {
    let sum: f64 = (0..4).map(|_| random.unit()).sum();
    ((sum - 2.0) * 3f64.sqrt()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_have_the_deviation_that_keeps_activations_in_range() {
        let mut random = Random::new(0, 0);
        let x: Vec<f64> = (0..20_000).map(|_| f64::from(normal(&mut random))).collect();
        let (mean, square) = (x.iter().sum::<f64>() / 2e4, x.iter().map(|x| x * x).sum::<f64>() / 2e4);
        assert!(mean.abs() < 0.03 && (square - 1.0).abs() < 0.03, "{mean} {square}");
    }

    #[test]
    fn the_large_model_is_of_8b_shape() {
        let tensors = EIGHT_B.tensors();
        let find = |name: &str| tensors.iter().find(|t| t.name == name).map(|t| (t.columns, t.rows, t.kind)).unwrap();
        assert_eq!(tensors.len(), 2 + 4 * 9);
        assert_eq!(find("blk.3.attn_k.weight"), (4096, 1024, Kind::Q4_0));
        assert_eq!(find("blk.0.ffn_down.weight"), (14336, 4096, Kind::Q4_0));
        assert_eq!(find("token_embd.weight"), (4096, 512, Kind::F16));
        assert_eq!(find("blk.1.ffn_norm.weight"), (4096, 1, Kind::F32));
    }

    #[test]
    fn the_same_weights_each_time() {
        let small = Shape { name: "small", layers: 1, heads: 2, kv_heads: 1, head: 32, embedding: 32, feed_forward: 32, vocabulary: 8, ..EIGHT_B };
        let bytes = || {
            let mut out = vec![];
            small.write(&mut out).unwrap();
            out
        };
        let file = bytes();
        assert_eq!(file.len() % 32, 0);
        assert!(file == bytes());
    }
}
