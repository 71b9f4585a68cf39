//! Near duplicates: functions of one line with two-word names, spread over source code, and half of them asked for.
//!
//! Words come several times, so that each name shares one with about eight others. Must not know who answers.

use anyhow::{bail, Result};

use super::corpus::{asked, Needle, Tokenizer};
use crate::random::Random;

/// Functions in the code.
const FUNCTIONS: usize = 100;
/// Those that are asked for.
const ASKED: usize = 50;
const FIRST: [&str; 20] = [
    "blue", "green", "silver", "golden", "quiet", "broken", "hidden", "frozen", "ancient", "little", "bright", "hollow", "purple", "rapid", "wooden",
    "gentle", "narrow", "distant", "lucky", "velvet",
];
const SECOND: [&str; 20] = [
    "river", "stone", "garden", "window", "bridge", "forest", "tower", "market", "island", "mirror", "candle", "harbor", "meadow", "rocket",
    "pencil", "basket", "valley", "orchard", "lantern", "engine",
];

/// Code with functions in it, and questions that each come right behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Functions {
    /// The code.
    pub tokens: Vec<i32>,
    /// In random order.
    pub questions: Vec<Question>,
}

impl Functions {
    /// Tokens of all questions.
    pub fn asked_tokens(&self) -> usize {
        self.questions.iter().map(|q| q.tokens.len()).sum()
    }

    /// Each question's place, counted through to its answer.
    pub fn needles(&self) -> Vec<Needle> {
        let behind = |q: &Question| Needle {
            planted: q.needle.planted,
            answer: q.needle.answer.start + self.tokens.len()..q.needle.answer.end + self.tokens.len(),
        };
        self.questions.iter().map(behind).collect()
    }
}

/// A function that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// An assertion, up to the end of the number that it compares with.
    pub tokens: Vec<i32>,
    /// Where its function is in the code, and which of the tokens above are the answer, counted from the end of the code.
    pub needle: Needle,
}

/// Spreads functions over the beginning of `code`, `length` tokens together.
pub fn spread(tokenizer: &mut dyn Tokenizer, code: &str, start: &[i32], random: &mut Random, length: usize) -> Result<Functions> {
    let pairs = random.order(FIRST.len() * SECOND.len());
    let names: Vec<String> = pairs.iter().take(FUNCTIONS).map(|i| format!("{}_{}", FIRST[i / SECOND.len()], SECOND[i % SECOND.len()])).collect();
    let numbers: Vec<String> = random.order(9000).iter().take(FUNCTIONS).map(|i| (1000 + i).to_string()).collect();
    let mut functions = vec![];
    for (name, number) in names.iter().zip(&numbers) {
        functions.push(tokenizer.encode(&format!("def {name}(): return {number}\n"))?);
    }
    let taken: usize = start.len() + functions.iter().map(Vec::len).sum::<usize>();
    let Some(room) = length.checked_sub(taken).filter(|r| *r > FUNCTIONS) else {
        bail!("{FUNCTIONS} functions take {taken} tokens, too many for code of {length}");
    };
    let mut tokens = start.to_vec();
    let mut places = vec![];
    let mut filled = 0;
    for line in code.split_inclusive('\n') {
        while places.len() < FUNCTIONS && filled >= room * (places.len() + 1) / (FUNCTIONS + 1) {
            places.push(tokens.len());
            tokens.extend(&functions[places.len() - 1]);
        }
        if filled >= room && places.len() == FUNCTIONS {
            break;
        }
        let line = tokenizer.encode(line)?;
        filled += line.len();
        tokens.extend(line);
    }
    if places.len() < FUNCTIONS {
        bail!("the code has {filled} tokens; {room} are needed");
    }
    let mut questions = vec![];
    for i in random.order(FUNCTIONS).into_iter().take(ASKED) {
        let text = format!("\nassert {}() == {}\n", names[i], numbers[i]);
        // A space of its own belongs to the question.
        let asked = |mark, tokenizer: &mut dyn Tokenizer| asked(tokenizer, &text, mark, &numbers[i]);
        let (mut question, answer) = asked("== ", tokenizer).or_else(|_| asked("==", tokenizer))?;
        question.truncate(answer.end);
        questions.push(Question { tokens: question, needle: Needle { planted: places[i], answer } });
    }
    Ok(Functions { tokens, questions })
}

#[cfg(test)]
mod tests {
    use super::super::corpus::tests::Bytes;
    use super::*;

    #[test]
    fn every_function_is_there_and_half_are_asked_for() {
        let code: String = (0..900).map(|i| format!("    x{} = {i}\n", i % 7)).collect();
        let make = |seed| spread(&mut Bytes, &code, &[1], &mut Random::new(seed, 3), 9000).unwrap();
        let f = make(1);
        assert_eq!(f, make(1));
        assert_ne!(f, make(2));
        let text = Bytes.decode(&f.tokens[1..]).unwrap();
        let defined: std::collections::BTreeSet<&str> = text.lines().filter(|l| l.starts_with("def ")).collect();
        assert_eq!((defined.len(), f.questions.len()), (100, 50));
        assert!((8900..9100).contains(&f.tokens.len()), "{}", f.tokens.len());
        for q in &f.questions {
            let function = Bytes.decode(&f.tokens[q.needle.planted..][..45.min(f.tokens.len() - q.needle.planted)]).unwrap();
            let (name, number) = function.strip_prefix("def ").unwrap().split_once("(): return ").unwrap();
            assert_eq!(Bytes.decode(&q.tokens).unwrap(), format!("\nassert {name}() == {}", &number[..4]));
            assert_eq!(Bytes.decode(&q.tokens[q.needle.answer.clone()]).unwrap(), number[..4]);
        }
        assert!(spread(&mut Bytes, &code, &[], &mut Random::new(1, 3), 3000).is_err());
        assert!(spread(&mut Bytes, &code[..3000], &[], &mut Random::new(1, 3), 9000).is_err());
    }
}
