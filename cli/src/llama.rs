//! `llama`: hands over to a tool of llama.cpp, with the files of models and texts in place of their names.
//!
//! Must not know what else the tools understand.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::{cmd, model, texts};

/// Builds the tool that is named first, and becomes it.
pub fn run(words: &[OsString], source: SourceKind, jobs: Option<u32>) -> Result<ExitCode> {
    let (tool, args) = words.split_first().context("no tool was named")?;
    let name = build::tool_name(&tool.to_string_lossy())?;
    let args = resolve(args)?;
    let request = Request { tree: Tree::Patched, targets: vec![name], source, jobs };
    cmd::hand_over(&build::ensure(&request)?.join(name), &args)
}

/// Puts files in the place of names. Another word behind `-m` may be a file that the tool is to make, so it is left alone.
fn resolve(args: &[OsString]) -> Result<Vec<OsString>> {
    let mut resolved = args.to_vec();
    for (i, pair) in args.windows(2).enumerate() {
        let (option, value) = (pair[0].to_str(), Path::new(&pair[1]));
        resolved[i + 1] = match option {
            Some("-m" | "--model") if model::find(&pair[1])?.is_some() => model::resolve(value)?.into(),
            Some("-f" | "--file") => texts::resolve(value)?.into(),
            _ => continue,
        };
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_words_are_passed_on() {
        let args = ["-m", "new.gguf", "-p", "smollm2", "-f", "a.txt", "--model"].map(OsString::from);
        assert_eq!(resolve(&args).unwrap(), args);
        assert!(resolve(&["-f", "text:poem"].map(OsString::from)).is_err());
    }
}
