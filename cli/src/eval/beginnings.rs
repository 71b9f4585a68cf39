//! Beginnings that say nothing about what comes after them: what a cache learns from its first rows is of no use there.
//!
//! Must not know what comes after them.

use anyhow::{bail, Result};

use super::corpus::Tokenizer;
use crate::random::Random;

/// All kinds.
pub const KINDS: [&str; 4] = ["hello", "spaces", "base64", "log"];

/// Characters that are enough for any number of tokens that is asked for, even of white space.
const LONGEST: usize = 1 << 22;

/// A beginning of `length` tokens.
pub fn beginning(tokenizer: &mut dyn Tokenizer, kind: &str, length: usize, seed: u64) -> Result<Vec<i32>> {
    let mut characters = 8 * length;
    while characters <= LONGEST {
        let mut tokens = tokenizer.encode(&text(kind, characters, seed))?;
        if tokens.len() >= length {
            tokens.truncate(length);
            return Ok(tokens);
        }
        characters *= 4;
    }
    bail!("{LONGEST} characters of `{kind}` are less than {length} tokens");
}

fn text(kind: &str, characters: usize, seed: u64) -> String {
    let mut random = Random::new(seed, 0);
    let line: &mut dyn FnMut() -> String = match kind {
        "hello" => &mut || "hello ".into(),
        // Lines that differ in length, as in a file of empty lines: otherwise a few tokens are all of them.
        "spaces" => &mut || " ".repeat(random.below(12)) + if random.below(4) == 0 { "\t\n" } else { "\n" },
        "base64" => &mut || (0..76).map(|_| BASE64[random.below(64)] as char).chain(['\n']).collect(),
        _ => &mut || "2024-05-13T08:15:42Z INFO server[2177]: connection from 10.0.3.17:52044 accepted, 0 errors\n".into(),
    };
    let mut text = String::new();
    while text.len() < characters {
        text += &line();
    }
    text
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#[cfg(test)]
mod tests {
    use super::super::corpus::tests::Bytes;
    use super::*;

    #[test]
    fn each_kind_is_as_long_as_asked() {
        for kind in KINDS {
            let tokens = beginning(&mut Bytes, kind, 300, 1).unwrap();
            assert_eq!(tokens.len(), 300);
            assert_eq!(tokens, beginning(&mut Bytes, kind, 300, 1).unwrap());
        }
        assert!(beginning(&mut Bytes, "spaces", 300, 1).unwrap().iter().all(|t| [32, 9, 10].contains(t)));
        assert!(beginning(&mut Bytes, "log", LONGEST + 1, 1).is_err());
    }
}
