//! From scenarios to the rows of results.
//!
//! Owns which sequences are judged where. Must not know how a measure is computed or shown.

use anyhow::Result;

use crate::judge::Positions;
use crate::law::Law;

use super::material::{Material, Scenario};
use super::scenario::Bench;
use super::session::Feed;
use super::summary::{Beginning, Divergence, Greedy, Recall, Rewind, Row, Switch};

/// All scenarios on one path, whose name is in the labels of the parts.
pub fn rows(bench: &mut Bench, path: &str, m: &Material, seed: u64) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = bench.settings.iter().map(|s| Row { setting: s.name.clone(), ..Row::default() }).collect();
    for scenario in &m.scenarios {
        let mut run = Run { bench, path, m, seed, rows: &mut rows };
        match scenario {
            Scenario::Text => run.text(),
            Scenario::Needles => run.needles(),
            Scenario::Greedy => run.greedy(),
            Scenario::OwnWords => run.own_words(),
            Scenario::Switch => run.switch(),
            Scenario::Law => run.law(),
            Scenario::Functions => run.functions(),
            Scenario::Beginnings => run.beginnings(),
            Scenario::Rewind => run.rewind(),
        }?;
    }
    Ok(rows)
}

struct Run<'r, 'b> {
    bench: &'r mut Bench<'b>,
    path: &'r str,
    m: &'r Material,
    seed: u64,
    rows: &'r mut [Row],
}

impl Run<'_, '_> {
    fn label(&self, name: &str) -> String {
        format!("{}-{name}", self.path)
    }

    fn quarter(&self) -> usize {
        self.m.prose[0].len() / 4
    }

    fn judged(&mut self, name: &str, tokens: &[i32], from: usize) -> Result<Vec<Positions>> {
        self.bench.judged(&self.label(name), tokens, from)
    }

    fn text(&mut self) -> Result<()> {
        let mut all = vec![vec![]; self.rows.len()];
        for (i, text) in self.m.prose.iter().enumerate() {
            let judged = self.judged(&format!("text{}", i + 1), text, self.quarter())?;
            all.iter_mut().zip(judged).for_each(|(all, new)| all.push(new));
        }
        self.rows.iter_mut().zip(all).for_each(|(row, all)| row.text = Some(Divergence::of(&all)));
        Ok(())
    }

    fn needles(&mut self) -> Result<()> {
        let mut found = vec![];
        for (i, haystack) in self.m.haystacks.iter().enumerate() {
            found.push(self.bench.needles(&self.label(&format!("needles{}", i + 1)), haystack)?);
        }
        for (s, row) in self.rows.iter_mut().enumerate() {
            let needles: Vec<_> = self.m.haystacks.iter().zip(&found).map(|(h, f)| (&h.needles[..], &f[s][..], &f[0][..])).collect();
            row.needles = (!needles.is_empty()).then(|| Recall::of(&needles));
        }
        Ok(())
    }

    fn greedy(&mut self) -> Result<()> {
        let (prompt, n) = &self.m.greedy;
        let greedy = self.bench.greedy(&self.label("greedy"), prompt, *n)?;
        self.rows.iter_mut().zip(&greedy).for_each(|(row, g)| row.greedy = Some(Greedy::of(&greedy[0], g)));
        Ok(())
    }

    fn own_words(&mut self) -> Result<()> {
        let (prompt, said) = &self.m.own_words;
        // Drawn on the first path and used on all.
        let feed = self.bench.feed;
        self.bench.feed = Feed { ubatch: 512, ..feed };
        let words = self.bench.own_words("own-words", prompt, *said, self.seed)?;
        self.bench.feed = feed;
        let own = self.judged("own-words", &words, prompt.len())?;
        self.rows.iter_mut().zip(own).for_each(|(row, own)| row.continuation = Some(Divergence::of(&[own])));
        Ok(())
    }

    fn switch(&mut self) -> Result<()> {
        let Some((same, other)) = &self.m.switch else { return Ok(()) };
        let half = same.len() / 2;
        let judged = self.judged("same-topic", same, half)?.into_iter().zip(self.judged("switched", other, half)?);
        self.rows.iter_mut().zip(judged).for_each(|(row, (same, other))| row.switch = Some(Switch::of(same, other)));
        Ok(())
    }

    fn law(&mut self) -> Result<()> {
        let looks = self.bench.look(&self.label("look"), &self.m.prose[0], self.quarter())?;
        for (row, look) in self.rows.iter_mut().zip(looks) {
            row.heads = Some(look.heads);
            row.law = (!look.law.is_empty()).then(|| Law::new(look.law, row.text.as_ref().map(|t| t.kl_mean)));
        }
        Ok(())
    }

    fn functions(&mut self) -> Result<()> {
        let Some(functions) = &self.m.functions else { return Ok(()) };
        let found = self.bench.functions(&self.label("functions"), functions)?;
        let needles = functions.needles();
        let recall = |f: &Vec<u8>| Recall::of(&[(&needles[..], &f[..], &found[0][..])]);
        self.rows.iter_mut().zip(&found).for_each(|(row, f)| row.functions = Some(recall(f)));
        Ok(())
    }

    fn beginnings(&mut self) -> Result<()> {
        let half = self.m.prose[0].len() / 2;
        let mut all: Vec<Vec<Beginning>> = vec![vec![]; self.rows.len()];
        for (kind, tokens) in &self.m.beginnings {
            let judged = self.judged(&format!("begun-{kind}"), tokens, tokens.len() - half)?;
            for (all, judged) in all.iter_mut().zip(judged) {
                let beginning = Beginning::of(kind, judged, all.first());
                all.push(beginning);
            }
        }
        self.rows.iter_mut().zip(all).for_each(|(row, all)| row.beginnings = all);
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        for detour in &self.m.detours {
            let label = self.label(&format!("rewound-{}", detour.len()));
            let judged = self.bench.rewound(&label, &self.m.prose[0], detour, &self.m.rewound_at)?;
            self.rows.iter_mut().zip(judged).for_each(|(row, judged)| row.rewinds.push(Rewind::of(detour.len(), judged)));
        }
        Ok(())
    }
}
