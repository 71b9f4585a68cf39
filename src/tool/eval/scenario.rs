//! What a setting is put through: prose, planted facts, its own words, a change of topic, and a look at each head.
//!
//! Owns the comparison with f16 on the same path. Must not know how results are shown.

use anyhow::Result;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use crate::tool::probe::Probe;

use super::corpus::Haystack;
use super::parts::Parts;
use super::session::{Feed, Session};
use super::settings::{nominal, Holding, Setting};
use crate::tool::judge::{argmax, log_softmax, Positions, RelativeError};
use crate::tool::random::Random;

/// Positions of a text at which attention outputs are compared.
const PROBED: usize = 32;
/// The temperature that the model's own text is sampled at.
const TEMPERATURE: f64 = 0.8;

/// All settings on one path.
pub struct Bench<'a> {
    /// The model.
    pub probe: &'a mut Probe,
    /// What is finished already.
    pub parts: &'a Parts,
    /// What is compared, in this order.
    pub settings: &'a [Setting],
    /// How tokens go in.
    pub feed: Feed,
    /// Counts tokens.
    pub bar: &'a ProgressBar,
}

fn bytes_of(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
}

impl Bench<'_> {
    /// One part for each setting. `make` finds in its last argument what it left there for an earlier setting: the
    /// reference, which is made only if some part is missing.
    fn each<T, R>(
        &mut self,
        label: &str,
        depends: &[&[u8]],
        cost: usize,
        mut make: impl FnMut(&mut Self, &Setting, &mut Option<R>) -> Result<T>,
    ) -> Result<Vec<T>>
    where
        T: Serialize + for<'d> Deserialize<'d>,
    {
        let parts = self.parts;
        let feed = format!("{:?}", self.feed);
        let mut reference = None;
        let end = self.bar.position() + cost as u64 * (self.settings.len() as u64 + 1);
        let mut done = vec![];
        for setting in self.settings {
            self.bar.set_message(format!("{label}: {setting}"));
            let label = format!("{label}-{setting}");
            let depends = [&[feed.as_bytes()], depends].concat();
            let is_new = !parts.has(&label, &depends);
            done.push(parts.get(&label, &depends, || make(self, setting, &mut reference))?);
            if is_new {
                self.tell(&label);
            } else {
                self.bar.inc(cost as u64);
            }
        }
        self.bar.set_position(end);
        Ok(done)
    }

    /// Without a terminal the bar is hidden: a line for each part says that it goes on.
    fn tell(&self, label: &str) {
        if self.bar.is_hidden() {
            eprintln!("{:3} % {label}", self.bar.position() * 100 / self.bar.length().unwrap_or(1).max(1));
        }
    }

    /// What each setting's cache holds.
    pub fn holdings(&mut self) -> Result<Vec<Holding>> {
        self.each("holding", &[], 0, |bench, setting, _: &mut Option<()>| {
            if let Some(codec) = setting.codec() {
                return Ok(nominal(codec, &bench.probe.info().layers, bench.feed.ctx as usize, bench.feed.window, bench.feed.sinks));
            }
            let session = Session::open(bench.probe, setting, &bench.feed, false, bench.bar)?;
            let context = session.context().clone();
            session.close()?;
            Ok(Holding { bytes: context.bytes_held as f64, code_bits: context.code_bits.unwrap_or(setting.stock_code_bits()) })
        })
    }

    /// Logits of positions from `from` on, one after the other.
    fn logits(&mut self, tokens: &[i32], from: usize) -> Result<Vec<f32>> {
        let mut all = vec![];
        let mut session = Session::open(self.probe, &Setting::reference(), &self.feed, false, self.bar)?;
        session.push(tokens, from, &mut |_, logits| {
            all.extend_from_slice(logits);
            Ok(())
        })?;
        session.close()?;
        Ok(all)
    }

    /// Compares the next-token distributions at positions `from` and later.
    pub fn judged(&mut self, label: &str, tokens: &[i32], from: usize) -> Result<Vec<Positions>> {
        let depends = [&bytes_of(tokens)[..], &from.to_le_bytes()];
        self.each(label, &depends, tokens.len(), |bench, setting, reference| {
            let reference: &Vec<f32> = match reference {
                Some(r) => r,
                None => reference.insert(bench.logits(tokens, from)?),
            };
            let vocabulary = bench.probe.info().n_vocab;
            let mut positions = Positions::default();
            let mut session = Session::open(bench.probe, setting, &bench.feed, false, bench.bar)?;
            session.push(tokens, from, &mut |p, logits| {
                positions.push(&reference[(p - from) * vocabulary..][..vocabulary], logits, tokens.get(p + 1).copied())
            })?;
            session.close()?;
            Ok(positions)
        })
    }

    /// For each setting and needle: 1 if every token of the answer is the most likely one.
    pub fn needles(&mut self, label: &str, haystack: &Haystack) -> Result<Vec<Vec<u8>>> {
        let Haystack { tokens, needles } = haystack;
        let spans: Vec<u8> = needles.iter().flat_map(|n| [n.answer.start.to_le_bytes(), n.answer.end.to_le_bytes()].concat()).collect();
        let from = needles.iter().map(|n| n.answer.start).min().unwrap_or(1) - 1;
        self.each(label, &[&bytes_of(tokens), &spans], tokens.len(), |bench, setting, _: &mut Option<()>| {
            let mut best = vec![];
            let mut session = Session::open(bench.probe, setting, &bench.feed, false, bench.bar)?;
            session.push(tokens, from, &mut |_, logits| {
                best.push(argmax(logits) as i32);
                Ok(())
            })?;
            session.close()?;
            // The token at p is predicted at p - 1.
            Ok(needles.iter().map(|n| u8::from(n.answer.clone().all(|p| best[p - 1 - from] == tokens[p]))).collect())
        })
    }

    /// Continues a prompt by `n` tokens.
    fn generate(&mut self, setting: &Setting, prompt: &[i32], n: usize, choose: &mut dyn FnMut(&[f32]) -> usize) -> Result<Vec<i32>> {
        let mut session = Session::open(self.probe, setting, &self.feed, false, self.bar)?;
        let (mut input, mut generated) = (prompt.to_vec(), vec![]);
        while generated.len() < n {
            let mut next = 0;
            session.push(&input, prompt.len() - 1 + generated.len(), &mut |_, logits| {
                next = choose(logits) as i32;
                Ok(())
            })?;
            generated.push(next);
            input = vec![next];
        }
        session.close()?;
        Ok(generated)
    }

    /// What each setting says after a prompt when the most likely token is always taken.
    pub fn greedy(&mut self, label: &str, prompt: &[i32], n: usize) -> Result<Vec<Vec<i32>>> {
        let depends = [&bytes_of(prompt)[..], &n.to_le_bytes()];
        self.each(label, &depends, prompt.len() + n, |bench, setting, _: &mut Option<()>| bench.generate(setting, prompt, n, &mut argmax))
    }

    /// The prompt and what f16 says after it, sampled.
    pub fn own_words(&mut self, label: &str, prompt: &[i32], n: usize, seed: u64) -> Result<Vec<i32>> {
        let feed = format!("{:?}", self.feed);
        let depends = [feed.as_bytes(), &bytes_of(prompt), &n.to_le_bytes(), &seed.to_le_bytes()];
        let parts = self.parts;
        self.bar.set_message(label.to_string());
        let said = parts.get(label, &depends, || {
            let mut random = Random::new(seed, 0);
            self.generate(&Setting::reference(), prompt, n, &mut |logits| sample(logits, random.unit()))
        })?;
        Ok([prompt, &said].concat())
    }

    /// For each setting the relative error of the attention output, `[layer][head]`, over some positions from `from` on.
    /// An error of one layer is in the input of the next.
    pub fn heads(&mut self, label: &str, tokens: &[i32], from: usize) -> Result<Vec<Vec<Vec<f64>>>> {
        let judged = tokens.len() - from;
        let n = PROBED.min(judged);
        let at: Vec<usize> = (1..=n).map(|i| from + judged * i / n - 1).collect();
        let depends = [&bytes_of(tokens)[..], &from.to_le_bytes()];
        self.each(label, &depends, tokens.len(), |bench, setting, reference| {
            let reference: &Vec<Vec<f32>> = match reference {
                Some(r) => r,
                None => reference.insert(bench.outputs(&Setting::reference(), tokens, &at)?),
            };
            let got = bench.outputs(setting, tokens, &at)?;
            let layers = bench.probe.info().layers.clone();
            let mut errors: Vec<Vec<RelativeError>> = layers.iter().map(|l| vec![RelativeError::default(); l.n_head]).collect();
            let present: Vec<usize> = (0..layers.len()).filter(|l| layers[*l].n_head > 0).collect();
            for (i, (reference, got)) in reference.iter().zip(&got).enumerate() {
                let l = present[i % present.len()];
                let heads = reference.chunks_exact(layers[l].d_v).zip(got.chunks_exact(layers[l].d_v));
                errors[l].iter_mut().zip(heads).for_each(|(e, (r, g))| e.add(r, g));
            }
            Ok(errors.iter().map(|l| l.iter().map(RelativeError::value).collect()).collect())
        })
    }

    /// Attention outputs at some positions: by position, then by layer that has attention.
    fn outputs(&mut self, setting: &Setting, tokens: &[i32], at: &[usize]) -> Result<Vec<Vec<f32>>> {
        let layers = self.probe.info().layers.iter().filter(|l| l.n_head > 0).count();
        let mut taken: Vec<(usize, usize, Vec<f32>)> = Vec::with_capacity(at.len() * layers);
        let mut session = Session::open(self.probe, setting, &self.feed, true, self.bar)?;
        session.push_captured(tokens, at, &mut |p, l, output| {
            taken.push((p, l, output.to_vec()));
            Ok(())
        })?;
        session.close()?;
        // One call gives several positions of a layer.
        taken.sort_by_key(|(p, l, _)| (*p, *l));
        Ok(taken.into_iter().map(|(_, _, o)| o).collect())
    }
}

/// The token at which the summed probability passes `share`.
fn sample(logits: &[f32], share: f64) -> usize {
    let cooled: Vec<f32> = logits.iter().map(|x| (f64::from(*x) / TEMPERATURE) as f32).collect();
    let mut sum = 0.0;
    let passed = log_softmax(&cooled).iter().position(|p| {
        sum += p.exp();
        sum > share
    });
    // The sum may end a rounding error below 1.
    passed.unwrap_or_else(|| argmax(logits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_follow_the_cooled_distribution() {
        // Odds 1 : 16 at temperature 0.8 become 1 : 32.
        let logits = [0.0, 16f32.ln()];
        assert_eq!([0.0, 0.0302, 0.0304, 0.999].map(|s| sample(&logits, s)), [0, 0, 1, 1]);
    }
}
