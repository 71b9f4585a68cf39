//! What an evaluation is made of: scenarios, and the token sequences that they need.
//!
//! Must not know how anything is measured on them.

use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;

use crate::probe::Probe;
use crate::random::Random;

use super::beginnings::{self, KINDS};
use super::corpus::{self, Haystack};
use super::functions::{self, Functions};
use super::scenario::{rewound_tokens, AFTER};
use super::{Options, Text};

/// Tokens of greedy generation, at most; shorter texts have a quarter of their length.
const GREEDY: usize = 128;
/// Tokens of the model's own words, at most.
const OWN_WORDS: usize = 2048;

/// What a setting is put through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    /// KL divergence on texts.
    Text,
    /// Planted facts, all asked for at the end of a text.
    Needles,
    /// What the model says when the likeliest token is always taken.
    Greedy,
    /// KL divergence on what f16 itself says, sampled.
    OwnWords,
    /// The second half of a text after the first half of another one; needs --switch.
    Switch,
    /// How far the output of each head is from f16's, and which layers, heads and sides the divergence comes from.
    Law,
    /// Near duplicates: 100 functions of one line in source code, 50 of them asked for; needs --code.
    Functions,
    /// A text behind beginnings that say nothing: one word, white space, base64, one line of a log.
    Beginnings,
    /// The tokens after 200 and 1000 tokens were taken back.
    Rewind,
}

/// The scenarios that need no file of their own.
pub const USUAL: [Scenario; 6] = [Scenario::Text, Scenario::Needles, Scenario::Greedy, Scenario::OwnWords, Scenario::Switch, Scenario::Law];

/// All token sequences; those of scenarios that nobody asked for may be missing.
pub struct Material {
    /// Scenarios in their order.
    pub scenarios: Vec<Scenario>,
    /// Pieces of texts.
    pub prose: Vec<Vec<i32>>,
    /// Pieces with planted facts.
    pub haystacks: Vec<Haystack>,
    /// A prompt, and how many tokens come after it.
    pub greedy: (Vec<i32>, usize),
    /// The same.
    pub own_words: (Vec<i32>, usize),
    /// After its own beginning, and after another one; judged is the second half.
    pub switch: Option<(Vec<i32>, Vec<i32>)>,
    /// Code and questions.
    pub functions: Option<Functions>,
    /// The first text without a beginning, then behind each kind of them; judged is its second half.
    pub beginnings: Vec<(&'static str, Vec<i32>)>,
    /// What is taken back in the first text: nothing, then detours.
    pub detours: Vec<Vec<i32>>,
    /// Where it is taken back.
    pub rewound_at: Vec<usize>,
}

/// What is asked for, in order; a change of topic is left out where there is none.
pub fn scenarios(o: &Options) -> Result<Vec<Scenario>> {
    let mut asked = if o.scenarios.is_empty() { USUAL.to_vec() } else { o.scenarios.clone() };
    asked.sort_unstable();
    asked.dedup();
    if o.switch.is_none() {
        ensure!(!o.scenarios.contains(&Scenario::Switch), "a change of topic needs another text: --switch");
        asked.retain(|s| *s != Scenario::Switch);
    }
    ensure!(o.code.is_some() || !asked.contains(&Scenario::Functions), "functions need source code around them: --code");
    Ok(asked)
}

impl Material {
    /// Cuts the files to pieces.
    pub fn prepare(o: &Options, probe: &mut Probe, files: &[Text], other: Option<&Text>, code: Option<&Text>) -> Result<Self> {
        let scenarios = scenarios(o)?;
        let has = |s| scenarios.contains(&s);
        let start: Vec<i32> = probe.info().bos.into_iter().collect();
        let tokens: Vec<Vec<i32>> = files.iter().map(|f| f.tokens.clone()).collect();
        let prose = corpus::pieces(&tokens, o.texts.into(), o.length, &start)?;
        let half = o.length / 2;
        let haystacks = if has(Scenario::Needles) { haystacks(o, probe, files, &start)? } else { vec![] };
        let functions = match code.filter(|_| has(Scenario::Functions)) {
            None => None,
            Some(code) => Some(functions::spread(probe, &code.text, &start, &mut Random::new(o.seed, 0), o.code_length)?),
        };
        let beginnings = if has(Scenario::Beginnings) { begun(o, probe, &prose[0], &start)? } else { vec![] };
        Ok(Self {
            switch: other.map(|t| switched(o, t, &prose[0], &start)).transpose()?,
            detours: if has(Scenario::Rewind) { detours(o, &tokens[0])? } else { vec![] },
            rewound_at: [half, (half + o.length) / 2, o.length].map(|at| at - AFTER).to_vec(),
            greedy: (prose[0][..half].to_vec(), GREEDY.min(o.length / 4)),
            own_words: (prose[0][..o.length / 4].to_vec(), OWN_WORDS.min(o.length)),
            scenarios,
            prose,
            haystacks,
            functions,
            beginnings,
        })
    }

    /// Tokens that a setting goes through, on one path.
    pub fn tokens(&self) -> usize {
        self.scenarios.iter().map(|s| self.tokens_of(*s)).sum()
    }

    fn tokens_of(&self, scenario: Scenario) -> usize {
        let all = |texts: &[Vec<i32>]| texts.iter().map(Vec::len).sum::<usize>();
        match scenario {
            Scenario::Text => all(&self.prose),
            Scenario::Needles => self.haystacks.iter().map(|h| h.tokens.len()).sum(),
            Scenario::Greedy => self.greedy.0.len() + self.greedy.1,
            Scenario::OwnWords => self.own_words.0.len() + self.own_words.1,
            Scenario::Switch => self.switch.as_ref().map_or(0, |(a, b)| a.len() + b.len()),
            Scenario::Law => self.prose[0].len(),
            Scenario::Functions => self.functions.as_ref().map_or(0, |f| f.tokens.len() + f.asked_tokens()),
            Scenario::Beginnings => self.beginnings.iter().map(|(_, t)| t.len()).sum(),
            Scenario::Rewind => self.detours.iter().map(|d| rewound_tokens(d.len(), &self.rewound_at)).sum(),
        }
    }

    /// Positions that a context must have.
    pub fn longest(&self) -> usize {
        let own_words = self.own_words.0.len() + self.own_words.1;
        let longest = |s: &Scenario| match s {
            Scenario::OwnWords => own_words,
            Scenario::Functions => self.tokens_of(Scenario::Functions),
            Scenario::Beginnings => self.beginnings.iter().map(|(_, t)| t.len()).max().unwrap_or(0),
            Scenario::Rewind => self.prose[0].len() + self.detours.iter().map(Vec::len).max().unwrap_or(0),
            _ => self.prose[0].len(),
        };
        self.scenarios.iter().map(longest).max().unwrap_or(0)
    }
}

fn haystacks(o: &Options, probe: &mut Probe, files: &[Text], start: &[i32]) -> Result<Vec<Haystack>> {
    let words = corpus::words(&files.iter().map(|f| f.text.as_str()).collect::<Vec<_>>().join("\n"));
    let haystack = |i: u16| {
        let base = &files[usize::from(i) % files.len()].tokens;
        corpus::haystack(probe, base, &words, start, &mut Random::new(o.seed, u64::from(i) + 1), o.length)
    };
    (0..o.needles).map(haystack).collect()
}

fn switched(o: &Options, other: &Text, first: &[i32], start: &[i32]) -> Result<(Vec<i32>, Vec<i32>)> {
    if other.tokens.len() < o.length {
        bail!("{} has {} tokens; --switch needs {}", other.source.file, other.tokens.len(), o.length);
    }
    let half = o.length / 2;
    let after = corpus::pieces(std::slice::from_ref(&other.tokens), 1, o.length, start)?.remove(0);
    let switched = [&first[..half], &after[half..]].concat();
    Ok((after, switched))
}

fn begun(o: &Options, probe: &mut Probe, text: &[i32], start: &[i32]) -> Result<Vec<(&'static str, Vec<i32>)>> {
    let mut all = vec![("none", text.to_vec())];
    for kind in KINDS {
        let beginning = beginnings::beginning(probe, kind, o.beginning, o.seed)?;
        all.push((kind, [start, &beginning, &text[start.len()..]].concat()));
    }
    Ok(all)
}

/// Nothing, and then the ends of a file.
fn detours(o: &Options, file: &[i32]) -> Result<Vec<Vec<i32>>> {
    let end = |n: &usize| file.len().checked_sub(*n).map(|at| file[at..].to_vec());
    let detours = o.rewind.iter().map(end).collect::<Option<Vec<_>>>().context("--rewind is longer than the first text file")?;
    Ok([vec![vec![]], detours].concat())
}
