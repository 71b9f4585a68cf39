//! Finds the programs that a build needs: python and pip, cmake, ninja, and the library itself.
//!
//! cmake and ninja come from PATH or, where they are missing, from pip into a folder of ours. Must
//! not know what is built with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use super::layout::Layout;
use super::{cmd, fsutil};

/// cmake and ninja.
pub struct Tools {
    /// The cmake to call.
    pub cmake: PathBuf,
    /// The ninja that cmake is to call.
    pub ninja: PathBuf,
}

impl Tools {
    /// From PATH, from an earlier installation of ours, or from a new one.
    pub fn find(layout: &Layout) -> Result<Self> {
        let own = layout.work.join("tools");
        if let Some(tools) = Self::look(&own) {
            return Ok(tools);
        }
        eprintln!("installing cmake and ninja with pip, for this build only");
        install(&own).context("cannot install cmake and ninja: check the network and pip, or install both yourself")?;
        Self::look(&own).with_context(|| format!("pip installed cmake and ninja in {}, but they do not run", own.display()))
    }

    fn look(own: &Path) -> Option<Self> {
        Some(Self { cmake: pick("cmake", own)?, ninja: pick("ninja", own)? })
    }
}

/// The first of PATH, the virtual environment, and the plain pip folder that really runs.
fn pick(name: &str, own: &Path) -> Option<PathBuf> {
    let site = own.join("site");
    let places = [PathBuf::from(name), own.join("venv/bin").join(name), site.join(name).join("data/bin").join(name), site.join("bin").join(name)];
    places.into_iter().find(|p| cmd::runs(p, &["--version"]))
}

fn install(own: &Path) -> Result<()> {
    fsutil::remove_dir(own)?;
    let venv = own.join("venv");
    let in_venv = cmd::output(Command::new(python()?).args(["-m", "venv"]).arg(&venv)).and_then(|_| {
        let mut pip = Command::new(venv.join("bin/python"));
        cmd::output(pip.args(PIP).args(["install", "--quiet", "cmake", "ninja"]))
    });
    if in_venv.is_ok() {
        return Ok(());
    }
    // Some systems have pip but cannot make virtual environments.
    fsutil::remove_dir(&venv)?;
    cmd::output(pip()?.args(["install", "--quiet", "--target"]).arg(own.join("site")).args(["cmake", "ninja"])).map(drop)
}

const PIP: [&str; 4] = ["-m", "pip", "--no-input", "--disable-pip-version-check"];

/// pip cannot give a package: the network, the package or pip itself is not there.
#[derive(Debug, thiserror::Error)]
#[error("pip cannot fetch {0}: check the network and pip")]
pub struct Unreachable(pub String);

/// `python3 -m pip`, which asks nothing.
pub fn pip() -> Result<Command> {
    let mut pip = Command::new(python()?);
    pip.args(PIP);
    Ok(pip)
}

/// Python 3, by the name that it has here.
pub fn python() -> Result<&'static str> {
    match ["python3", "python"].into_iter().find(|p| cmd::runs(p, &["-c", "import sys; sys.exit(sys.version_info[0] < 3)"])) {
        Some(python) => Ok(python),
        None => bail!("python3 is needed and not on PATH: install it, with pip"),
    }
}

/// The static library, fresh from cargo, always optimised: whichever profile this program has, a
/// cache in a debug build would be too slow to judge.
pub fn static_library(layout: &Layout) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    if cmd::runs(&cargo, &["--version"]) {
        let mut build = Command::new(cargo);
        build.args(["build", "--release", "--lib", "--message-format=json-render-diagnostics", "--manifest-path"]);
        build.arg(layout.root.join("Cargo.toml")).arg("--target-dir").arg(&layout.target);
        if !layout.target.join("release/libspectral_kv.a").is_file() {
            eprintln!("building the library with cargo");
        }
        let messages = cmd::text(&mut build).context("cannot build the library")?;
        return library_in(&messages).with_context(|| format!("`{}` made no static library", cmd::shown(&build)));
    }
    let exe = std::env::current_exe().context("cannot tell where this program is")?;
    let beside = exe.with_file_name("libspectral_kv.a");
    if !beside.is_file() {
        bail!("{} is missing: run `cargo build --release`", beside.display());
    }
    Ok(beside)
}

/// The static library among cargo's messages, one JSON object per line.
fn library_in(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .filter(|m| m["reason"] == "compiler-artifact" && m["target"]["name"] == "spectral_kv")
        .filter_map(|m| m["filenames"].as_array().cloned())
        .flatten()
        .filter_map(|f| f.as_str().map(PathBuf::from))
        .find(|f| f.extension().is_some_and(|e| e == "a" || e == "lib"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_library_among_the_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"serde"},"filenames":["/t/libserde.a"]}
{"reason":"compiler-artifact","target":{"name":"spectral_kv"},"filenames":["/t/libspectral_kv.rlib","/t/libspectral_kv.a"]}
{"reason":"build-finished","success":true}"#;
        assert_eq!(library_in(messages), Some(PathBuf::from("/t/libspectral_kv.a")));
        assert_eq!(library_in(""), None);
    }
}
