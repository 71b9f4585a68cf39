//! What a setting is put through: texts, planted facts, near duplicates, its own words, and going back.
//!
//! Owns the comparison with f16 on the same path. Must not know how results are shown.

use anyhow::Result;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use crate::probe::{Keep, Probe};

use super::corpus::Haystack;
use super::functions::{Functions, Question};
use super::logits::Logits;
use super::parts::Parts;
use super::session::{Feed, Session, TakeLogits};
use super::settings::{nominal, Holding, Setting};
use crate::judge::{argmax, log_softmax, Positions};
use crate::random::Random;

/// The temperature that the model's own text is sampled at.
const TEMPERATURE: f64 = 0.8;

/// Tokens that are judged after something was taken back.
pub const AFTER: usize = 24;

/// Tokens that [`Bench::rewound`] decodes.
pub fn rewound_tokens(detour: usize, at: &[usize]) -> usize {
    at.last().map_or(0, |p| p + AFTER) + at.len() * detour
}

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

/// Tokens as something that a part depends on.
pub fn bytes_of(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
}

impl Bench<'_> {
    /// One part for each setting. `make` finds in its last argument what it left there for an earlier setting: the
    /// reference, which is made only if some part is missing.
    pub fn each<T, R>(
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
            if let Some(codec) = setting.simulated() {
                return Ok(nominal(codec, &bench.probe.info().layers, bench.feed.ctx as usize, bench.feed.window, bench.feed.sinks));
            }
            let session = Session::open(bench.probe, setting, &bench.feed, Keep::Nothing, bench.bar)?;
            let context = session.context().clone();
            session.close()?;
            Ok(Holding { bytes: context.bytes_held as f64, code_bits: context.code_bits.unwrap_or(setting.stock_code_bits()) })
        })
    }

    fn new_logits(&self) -> Result<Logits> {
        Logits::create(self.parts.dir(), self.probe.info().n_vocab)
    }

    /// Logits of positions from `from` on, one after the other.
    fn logits(&mut self, tokens: &[i32], from: usize) -> Result<Logits> {
        let mut all = self.new_logits()?;
        let mut session = Session::open(self.probe, &Setting::reference(), &self.feed, Keep::Nothing, self.bar)?;
        session.push(tokens, from, &mut |_, logits| all.push(logits))?;
        session.close()?;
        Ok(all)
    }

    /// Compares the next-token distributions at positions `from` and later.
    pub fn judged(&mut self, label: &str, tokens: &[i32], from: usize) -> Result<Vec<Positions>> {
        let depends = [&bytes_of(tokens)[..], &from.to_le_bytes()];
        self.each(label, &depends, tokens.len(), |bench, setting, reference| {
            if *setting == Setting::reference() {
                return Ok(Positions::same(tokens.len() - from));
            }
            let reference = match reference {
                Some(r) => r,
                None => reference.insert(bench.logits(tokens, from)?),
            };
            reference.rewind()?;
            let mut positions = Positions::default();
            let mut session = Session::open(bench.probe, setting, &bench.feed, Keep::Nothing, bench.bar)?;
            session.push(tokens, from, &mut |p, logits| positions.push(reference.next_row()?, logits, tokens.get(p + 1).copied()))?;
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
            let mut session = Session::open(bench.probe, setting, &bench.feed, Keep::Nothing, bench.bar)?;
            session.push(tokens, from, &mut |_, logits| {
                best.push(argmax(logits) as i32);
                Ok(())
            })?;
            session.close()?;
            // The token at p is predicted at p - 1.
            Ok(needles.iter().map(|n| u8::from(n.answer.clone().all(|p| best[p - 1 - from] == tokens[p]))).collect())
        })
    }

    /// For each setting and question: 1 if the answer is what greedy decoding gives. The code goes in once; every question comes right
    /// behind it, and is taken back.
    pub fn functions(&mut self, label: &str, f: &Functions) -> Result<Vec<Vec<u8>>> {
        let n = f.tokens.len();
        let asked: Vec<u8> = f.questions.iter().flat_map(|q| [bytes_of(&q.tokens), q.needle.answer.start.to_le_bytes().to_vec()].concat()).collect();
        self.each(label, &[&bytes_of(&f.tokens), &asked], n + f.asked_tokens(), |bench, setting, _: &mut Option<()>| {
            let mut found = vec![];
            let mut session = Session::open(bench.probe, setting, &bench.feed, Keep::Nothing, bench.bar)?;
            session.push(&f.tokens, usize::MAX, &mut |_, _| Ok(()))?;
            for Question { tokens, needle } in &f.questions {
                // The first wrong token ends a right answer, so the right ones can go in at once.
                let mut best = vec![];
                session.push(&tokens[..tokens.len() - 1], n + needle.answer.start - 1, &mut |_, logits| {
                    best.push(argmax(logits) as i32);
                    Ok(())
                })?;
                found.push(u8::from(best == tokens[needle.answer.clone()]));
                session.truncate(n)?;
            }
            session.close()?;
            Ok(found)
        })
    }

    /// Compares the next-token distributions at the `AFTER` tokens from each of some positions on, after a detour that was taken
    /// back.
    pub fn rewound(&mut self, label: &str, text: &[i32], detour: &[i32], at: &[usize]) -> Result<Vec<Positions>> {
        let places: Vec<u8> = at.iter().flat_map(|p| p.to_le_bytes()).collect();
        self.each(label, &[&bytes_of(text), &bytes_of(detour), &places], rewound_tokens(detour.len(), at), |bench, setting, reference| {
            if *setting == Setting::reference() {
                return Ok(Positions::same(at.len() * AFTER));
            }
            let reference = match reference {
                Some(r) => r,
                None => {
                    let mut all = bench.new_logits()?;
                    bench.rewind(&Setting::reference(), text, detour, at, &mut |_, logits| all.push(logits))?;
                    reference.insert(all)
                }
            };
            reference.rewind()?;
            let mut positions = Positions::default();
            bench.rewind(setting, text, detour, at, &mut |p, logits| positions.push(reference.next_row()?, logits, text.get(p + 1).copied()))?;
            Ok(positions)
        })
    }

    fn rewind(&mut self, setting: &Setting, text: &[i32], detour: &[i32], at: &[usize], take: &mut TakeLogits) -> Result<()> {
        let mut session = Session::open(self.probe, setting, &self.feed, Keep::Nothing, self.bar)?;
        let mut n = 0;
        for at in at {
            session.push(&[&text[n..*at], detour].concat(), usize::MAX, &mut |_, _| Ok(()))?;
            session.truncate(*at)?;
            n = at + AFTER;
            session.push(&text[*at..n], *at, take)?;
        }
        session.close()
    }

    /// Continues a prompt by `n` tokens.
    fn generate(&mut self, setting: &Setting, prompt: &[i32], n: usize, choose: &mut dyn FnMut(&[f32]) -> usize) -> Result<Vec<i32>> {
        let mut session = Session::open(self.probe, setting, &self.feed, Keep::Nothing, self.bar)?;
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
