//! A look into the attention of each setting: how far the output of each head is from f16's, and the terms of the law.
//!
//! Owns the positions that are looked at. Must not know how results are shown.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::judge::RelativeError;
use crate::law::{self, Terms, Token};
use crate::probe::{ContextSpec, Keep, Tensor};

use super::scenario::{bytes_of, Bench};
use super::session::{Seen, Session};
use super::settings::Setting;

/// Positions of a text that are looked at.
const SEEN: usize = 128;

/// What is seen of a setting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Relative error of the attention output, `[layer][head]`. An error of one layer is in the input of the next.
    pub heads: Vec<Vec<f64>>,
    /// The law's terms of each layer; none at all where the way from the attention to the residual stream is not known. An error of one
    /// layer is not in the next.
    pub law: Vec<Terms>,
}

impl Bench<'_> {
    /// A look at each setting, at some positions from `from` on.
    pub fn look(&mut self, label: &str, tokens: &[i32], from: usize) -> Result<Vec<Look>> {
        let judged = tokens.len() - from;
        let n = SEEN.min(judged);
        let at: Vec<usize> = (1..=n).map(|i| from + judged * i / n - 1).collect();
        let depends = [&bytes_of(tokens)[..], &from.to_le_bytes(), &n.to_le_bytes()];
        self.each(label, &depends, tokens.len(), |bench, setting, reference| {
            if *setting == Setting::reference() {
                let heads = bench.probe.info().layers.iter().map(|l| vec![0.0; l.n_head]).collect();
                return Ok(Look { heads, law: vec![] });
            }
            let reference = match reference {
                Some(r) => &*r,
                None => reference.insert(bench.seen(&Setting::reference(), tokens, &at, Keep::Tensors, Tensor::Joined)?),
            };
            let seen = bench.seen(setting, tokens, &at, Keep::ExactRows, Tensor::Errors)?;
            let law = bench.law(reference, &seen).unwrap_or_else(|e| {
                bench.bar.suspend(|| eprintln!("no law for {setting} on this model: {e:#}"));
                vec![]
            });
            Ok(Look { heads: bench.head_errors(reference, &seen), law })
        })
    }

    /// The attention at some positions, by position and then by layer that has attention.
    fn seen(&mut self, setting: &Setting, tokens: &[i32], at: &[usize], keep: Keep, more: Tensor) -> Result<Vec<Seen>> {
        let mut all = vec![];
        let mut session = Session::open(self.probe, setting, &self.feed, keep, self.bar)?;
        session.push_seen(tokens, at, more, &mut |seen| {
            all.push(seen);
            Ok(())
        })?;
        session.close()?;
        // One call gives several positions of a layer.
        all.sort_by_key(|s| (s.position, s.layer));
        Ok(all)
    }

    fn head_errors(&self, reference: &[Seen], seen: &[Seen]) -> Vec<Vec<f64>> {
        let layers = &self.probe.info().layers;
        let mut errors: Vec<Vec<RelativeError>> = layers.iter().map(|l| vec![RelativeError::default(); l.n_head]).collect();
        for (exact, got) in reference.iter().zip(seen) {
            let d = layers[got.layer].d_v;
            let heads = exact.attention.chunks_exact(d).zip(got.attention.chunks_exact(d));
            errors[got.layer].iter_mut().zip(heads).for_each(|(e, (r, g))| e.add(r, g));
        }
        errors.iter().map(|l| l.iter().map(RelativeError::value).collect()).collect()
    }

    fn law(&mut self, reference: &[Seen], seen: &[Seen]) -> Result<Vec<Terms>> {
        let tokens: Vec<Token> =
            reference.iter().zip(seen).map(|(r, s)| Token { layer: r.layer, attention: &r.attention, joined: &r.more, errors: &s.more }).collect();
        let spec = ContextSpec { n_ctx: 256, n_ubatch: 1, cache: Setting::reference().cache(0), keep: Keep::Nothing };
        let context = self.probe.open(&spec)?;
        let terms = law::by_layer(self.probe, &context, &tokens);
        self.probe.close(&context)?;
        terms
    }
}
