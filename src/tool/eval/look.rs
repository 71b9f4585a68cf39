//! A look into the attention of each setting: how far the output of each head is from f16's, and the terms of the law.
//!
//! Owns the positions that are looked at. Must not know how results are shown.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::tool::judge::RelativeError;
use crate::tool::law::{self, Branch, Stream, Terms};
use crate::tool::probe::{Context, ContextSpec, Keep, Tensor};

use super::scenario::{bytes_of, Bench};
use super::session::{Seen, Session};
use super::settings::Setting;

/// Positions of a text that are looked at.
const SEEN: usize = 64;

/// What is seen of a setting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Relative error of the attention output, `[layer][head]`. An error of one layer is in the input of the next.
    pub heads: Vec<Vec<f64>>,
    /// The law's terms of each layer; none at all where the way from the attention to the residual stream is not known. An error of one
    /// layer is not in the next.
    pub law: Vec<Terms>,
}

/// The reference: outputs by position and layer, and what they join.
struct Reference {
    seen: Vec<Seen>,
    streams: Vec<Stream>,
}

impl Bench<'_> {
    /// A look at each setting, at some positions from `from` on.
    pub fn look(&mut self, label: &str, tokens: &[i32], from: usize) -> Result<Vec<Look>> {
        let judged = tokens.len() - from;
        let n = SEEN.min(judged);
        let at: Vec<usize> = (1..=n).map(|i| from + judged * i / n - 1).collect();
        let depends = [&bytes_of(tokens)[..], &from.to_le_bytes(), &n.to_le_bytes()];
        self.each(label, &depends, tokens.len(), |bench, setting, reference| {
            let reference = match reference {
                Some(r) => &*r,
                None => reference.insert(bench.reference(tokens, &at)?),
            };
            let seen = bench.seen(setting, tokens, &at, Keep::ExactRows, Tensor::Errors)?;
            Ok(Look { heads: bench.head_errors(reference, &seen), law: bench.law(reference, &seen)? })
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

    /// What f16 has; without streams where the law cannot be told, with a line that says why.
    fn reference(&mut self, tokens: &[i32], at: &[usize]) -> Result<Reference> {
        let seen = self.seen(&Setting::reference(), tokens, at, Keep::Tensors, Tensor::Joined)?;
        let mut streams = vec![Stream::default(); seen.len()];
        let told = self.each_branch(|l, branch| {
            let of_layer = seen.iter().zip(&mut streams).filter(|(s, _)| s.layer == l);
            of_layer.into_iter().try_for_each(|(seen, stream)| {
                *stream = branch.stream(&seen.attention, &seen.more)?;
                Ok(())
            })
        });
        if let Err(e) = told {
            self.bar.suspend(|| eprintln!("no law for this model: {e:#}"));
            streams.clear();
        }
        Ok(Reference { seen, streams })
    }

    /// All layers' ways to the residual stream, one after the other: together they are a large part of a model.
    fn each_branch(&mut self, mut each: impl FnMut(usize, &Branch) -> Result<()>) -> Result<()> {
        let spec = ContextSpec { n_ctx: 256, n_ubatch: 1, cache: Setting::reference().cache(0), keep: Keep::Nothing };
        let context: Context = self.probe.open(&spec)?;
        let layers = self.probe.info().layers.clone();
        let mut present = (0..layers.len()).filter(|l| layers[*l].n_head > 0);
        let done = present.try_for_each(|l| each(l, &Branch::read(self.probe, &context, l)?));
        self.probe.close(&context)?;
        done
    }

    fn head_errors(&self, reference: &Reference, seen: &[Seen]) -> Vec<Vec<f64>> {
        let layers = &self.probe.info().layers;
        let mut errors: Vec<Vec<RelativeError>> = layers.iter().map(|l| vec![RelativeError::default(); l.n_head]).collect();
        for (exact, got) in reference.seen.iter().zip(seen) {
            let d = layers[got.layer].d_v;
            let heads = exact.attention.chunks_exact(d).zip(got.attention.chunks_exact(d));
            errors[got.layer].iter_mut().zip(heads).for_each(|(e, (r, g))| e.add(r, g));
        }
        errors.iter().map(|l| l.iter().map(RelativeError::value).collect()).collect()
    }

    fn law(&mut self, reference: &Reference, seen: &[Seen]) -> Result<Vec<Terms>> {
        let layers = self.probe.info().layers.clone();
        let mut terms = vec![Terms::default(); layers.len()];
        if reference.streams.is_empty() || seen.iter().any(|s| s.more.is_empty()) {
            return Ok(vec![]);
        }
        self.each_branch(|l, branch| {
            let of_layer = seen.iter().zip(&reference.streams).filter(|(s, _)| s.layer == l);
            let tokens: Vec<Terms> = of_layer.map(|(s, stream)| branch.terms(stream, layers[l].n_head_kv, &s.more)).collect::<Result<_>>()?;
            terms[l] = law::mean(&tokens);
            Ok(())
        })?;
        Ok(terms)
    }
}
