//! The token sequences of an evaluation: pieces of texts, and texts with planted facts.
//!
//! Must not know what is done with them.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{bail, Result};

use crate::probe::Probe;

use crate::random::Random;

/// Facts in a text of 2048 tokens and more; shorter ones have a share of them.
const FACTS: usize = 12;
const TOKENS_PER_FACT: usize = 170;

/// From text to tokens and back.
pub trait Tokenizer {
    /// The tokens of a piece of text, nothing added.
    fn encode(&mut self, text: &str) -> Result<Vec<i32>>;
    /// The text of tokens.
    fn decode(&mut self, tokens: &[i32]) -> Result<String>;
}

impl Tokenizer for Probe {
    fn encode(&mut self, text: &str) -> Result<Vec<i32>> {
        self.tokenize(text, false)
    }

    fn decode(&mut self, tokens: &[i32]) -> Result<String> {
        self.detokenize(tokens)
    }
}

/// Pieces of `length` tokens, taken from the files in turn and evenly spread over each; `start` goes before each piece.
pub fn pieces(files: &[Vec<i32>], count: usize, length: usize, start: &[i32]) -> Result<Vec<Vec<i32>>> {
    let body = length - start.len();
    let mut pieces = vec![];
    for i in 0..count {
        let file = &files[i % files.len()];
        // How many pieces this file gives.
        let share = (count - i % files.len()).div_ceil(files.len());
        let at = (i / files.len()) * file.len() / (share + 1);
        let Some(piece) = file.get(at..at + body) else {
            bail!("text file {} has {} tokens, too few for {share} piece(s) of {length}", i % files.len() + 1, file.len());
        };
        pieces.push([start, piece].concat());
    }
    Ok(pieces)
}

/// A planted fact that is asked back.
#[derive(Clone, Debug, PartialEq)]
pub struct Needle {
    /// Where its sentence begins.
    pub planted: usize,
    /// The tokens of the answer to its question.
    pub answer: Range<usize>,
}

/// A text with planted facts, all asked back at its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Haystack {
    /// The text with facts and questions.
    pub tokens: Vec<i32>,
    /// In the order of their places.
    pub needles: Vec<Needle>,
}

/// Words to make names of: frequent, but not the most frequent ones.
pub fn words(text: &str) -> Vec<String> {
    let mut counts: HashMap<&str, (usize, usize)> = HashMap::new();
    let is_word = |w: &&str| (4..=9).contains(&w.len()) && w.bytes().all(|b| b.is_ascii_lowercase());
    for (i, word) in text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(is_word).enumerate() {
        counts.entry(word).or_insert((0, i)).0 += 1;
    }
    let mut words: Vec<_> = counts.into_iter().collect();
    // Frequent ones first, equally frequent ones as they come in the text.
    words.sort_by_key(|(_, (count, first))| (std::cmp::Reverse(*count), *first));
    let skip = if words.len() >= 600 { 300 } else { 0 };
    words.into_iter().skip(skip).take(2000).map(|(w, _)| w.to_string()).collect()
}

/// Plants facts evenly in a piece of `base` and asks all of them back in random order.
pub fn haystack(
    tokenizer: &mut dyn Tokenizer,
    base: &[i32],
    words: &[String],
    start: &[i32],
    random: &mut Random,
    length: usize,
) -> Result<Haystack> {
    let n = (length / TOKENS_PER_FACT).clamp(1, FACTS);
    if words.len() < 2 * n {
        bail!("the text has {} different words of 4 to 9 small letters; at least {} are needed for needles", words.len(), 2 * n);
    }
    let mut names: Vec<String> = vec![];
    while names.len() < n {
        let (a, b) = (&words[random.below(words.len())], &words[random.below(words.len())]);
        let name = format!("{}{} {b}", a[..1].to_ascii_uppercase(), &a[1..]);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let codes: Vec<String> = (0..n).map(|_| (10000 + random.below(90000)).to_string()).collect();
    let mut facts = vec![];
    let mut questions = vec![];
    for (name, code) in names.iter().zip(&codes) {
        facts.push(tokenizer.encode(&format!("\nThe secret code for {name} is {code}.\n"))?);
        let question = format!("\nQuestion: what is the secret code for {name}? Answer: {code}.\n");
        questions.push(asked(tokenizer, &question, "Answer:", code)?);
    }
    let asked: usize = questions.iter().map(|(q, _)| q.len()).sum();
    let planted: usize = facts.iter().map(Vec::len).sum();
    let Some(prose) = length.checked_sub(start.len() + asked + planted).filter(|p| *p >= n + 2 && *p <= base.len()) else {
        bail!("{n} facts and questions do not go into {length} tokens of a text that has {}", base.len());
    };
    let gap = prose / (n + 2);
    let mut prose = base[random.below(base.len() - prose + 1)..][..prose].iter();

    let mut tokens = start.to_vec();
    let mut places = vec![];
    for fact in &facts {
        tokens.extend(prose.by_ref().take(gap));
        places.push(tokens.len());
        tokens.extend(fact);
    }
    tokens.extend(prose);
    let mut needles: Vec<Needle> = places.into_iter().map(|planted| Needle { planted, answer: 0..0 }).collect();
    for i in random.order(n) {
        let (question, answer) = &questions[i];
        needles[i].answer = tokens.len() + answer.start..tokens.len() + answer.end;
        tokens.extend(question);
    }
    Ok(Haystack { tokens, needles })
}

/// The tokens of a question with its answer, and which of them are the answer. Tokenizers join things differently, so the
/// answer is where its text comes out: from the first token after `mark` to the one that completes the code.
pub fn asked(tokenizer: &mut dyn Tokenizer, text: &str, mark: &str, code: &str) -> Result<(Vec<i32>, Range<usize>)> {
    let tokens = tokenizer.encode(text)?;
    let mut first = None;
    for end in 1..=tokens.len() {
        let text = tokenizer.decode(&tokens[..end])?;
        let Some((_, answer)) = text.split_once(mark) else { continue };
        let first = *first.get_or_insert(end);
        if answer.contains(code) && first < end {
            return Ok((tokens, first..end));
        }
    }
    bail!("the answer {code} cannot be told from its question in the tokens of this model");
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Bytes, but digits in pairs where they come so.
    pub struct Bytes;

    impl Tokenizer for Bytes {
        fn encode(&mut self, text: &str) -> Result<Vec<i32>> {
            let (b, mut out, mut i) = (text.as_bytes(), vec![], 0);
            while i < b.len() {
                let pair = i + 1 < b.len() && b[i].is_ascii_digit() && b[i + 1].is_ascii_digit();
                out.push(if pair { 256 + i32::from(b[i]) * 256 + i32::from(b[i + 1]) } else { i32::from(b[i]) });
                i += if pair { 2 } else { 1 };
            }
            Ok(out)
        }

        fn decode(&mut self, tokens: &[i32]) -> Result<String> {
            let bytes = tokens.iter().flat_map(|t| if *t < 256 { vec![*t as u8] } else { vec![((t - 256) / 256) as u8, ((t - 256) % 256) as u8] });
            Ok(String::from_utf8(bytes.collect())?)
        }
    }

    fn prose() -> (String, Vec<i32>) {
        let syllables = ["ka", "lo", "mi", "ru", "te"];
        let word = |i: usize| [i, i / 5, i * 3].map(|j| syllables[j % 5]).concat();
        let text: String = (0..400).map(|i| word(i * 7 % 50) + if i % 9 == 0 { ". " } else { " " }).collect();
        let tokens = Bytes.encode(&text).unwrap();
        (text, tokens)
    }

    #[test]
    fn haystacks_are_deterministic_and_their_spans_are_the_answers() {
        let (text, base) = prose();
        let words = words(&text);
        let make = |seed| haystack(&mut Bytes, &base, &words, &[1], &mut Random::new(seed, 7), 1024).unwrap();
        let h = make(1);
        assert_eq!(h, make(1));
        assert_ne!(h, make(2));
        assert_eq!((h.tokens.len(), h.needles.len(), h.tokens[0]), (1024, 6, 1));
        for needle in &h.needles {
            let fact = Bytes.decode(&h.tokens[needle.planted..][..60]).unwrap();
            let (name, code) = fact.strip_prefix("\nThe secret code for ").unwrap().split_once(" is ").unwrap();
            let answer = Bytes.decode(&h.tokens[needle.answer.clone()]).unwrap();
            assert_eq!(answer, format!(" {}", &code[..5]));
            let question = Bytes.decode(&h.tokens[..needle.answer.start]).unwrap();
            assert!(question.ends_with(&format!("\nQuestion: what is the secret code for {name}? Answer:")));
        }
        assert!(h.needles.windows(2).all(|w| w[0].planted < w[1].planted));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let (text, base) = prose();
        let words = words(&text);
        assert!(haystack(&mut Bytes, &base, &words, &[], &mut Random::new(1, 0), 100).is_err());
        assert!(haystack(&mut Bytes, &base[..300], &words, &[], &mut Random::new(1, 0), 1024).is_err());
        assert!(haystack(&mut Bytes, &base, &words[..3], &[], &mut Random::new(1, 0), 1024).is_err());
    }

    #[test]
    fn words_are_counted() {
        assert_eq!(words("beta alpha beta Gamma abc x_y alpha1 beta"), ["beta", "alpha"]);
    }

    #[test]
    fn pieces_are_spread() {
        let files = [(0..100).collect::<Vec<i32>>(), (100..160).collect()];
        let p = pieces(&files, 3, 11, &[-1]).unwrap();
        assert_eq!(p.iter().map(|p| (p[0], p[1], p.len())).collect::<Vec<_>>(), [(-1, 0, 11), (-1, 100, 11), (-1, 33, 11)]);
        assert!(pieces(&files, 2, 100, &[]).is_err());
    }
}
