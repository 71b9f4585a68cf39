//! Makes the source trees: pristine llama.cpp, and llama.cpp with the patch and the glue.
//!
//! Owns what a tree consists of and when it must be made anew. A tree is made beside the one in use
//! and then mirrored into it, so that only files that really changed are compiled again. Must not
//! know how sources are fetched or compiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use super::fetch::{self, SourceKind};
use super::layout::{Layout, Pin};
use super::{cmd, fsutil};

/// Which of the two trees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tree {
    /// llama.cpp as it is.
    Stock,
    /// llama.cpp with the spectral cache.
    Patched,
}

impl Tree {
    /// The tree's own folder. Inside, both trees have the same names, and ccache compiles with paths
    /// relative to it: what the patch does not touch is compiled once.
    pub fn home(self, layout: &Layout) -> PathBuf {
        layout.work.join(match self {
            Tree::Stock => "stock",
            Tree::Patched => "patched",
        })
    }
}

/// The patch and the glue of this repository.
struct Changes {
    patches: Vec<PathBuf>,
    glue: PathBuf,
    glue_files: Vec<PathBuf>,
}

impl Changes {
    fn read(root: &Path) -> Result<Self> {
        let dir = root.join("vendor/patches");
        let listed = if dir.is_dir() { fsutil::files(&dir, &|_| false)? } else { Default::default() };
        let patches: Vec<_> = listed.iter().filter(|p| p.extension().is_some_and(|e| e == "patch")).map(|p| dir.join(p)).collect();
        if patches.is_empty() {
            bail!("no *.patch in {}: the checkout is not complete", dir.display());
        }
        let glue = root.join("vendor/glue");
        let glue_files = if glue.is_dir() { fsutil::files(&glue, &|_| false)?.into_iter().collect() } else { vec![] };
        Ok(Self { patches, glue, glue_files })
    }

    fn hash(&self) -> Result<String> {
        let mut parts = vec![];
        for path in &self.patches {
            parts.push(fs::read(path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        for rel in &self.glue_files {
            let path = self.glue.join(rel);
            parts.push(rel.to_string_lossy().into_owned().into_bytes());
            parts.push(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        Ok(fsutil::sha256_of(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>()))
    }

    fn apply(&self, tree: &Path) -> Result<()> {
        for patch in &self.patches {
            let mut apply = if cmd::runs("patch", &["--version"]) {
                let mut c = Command::new("patch");
                c.args(["-p1", "-N", "-f", "-F", "0", "-i"]).arg(patch);
                c
            } else if cmd::runs("git", &["--version"]) {
                let mut c = Command::new("git");
                // Inside of another repository git would silently skip every file.
                c.arg("apply").arg(patch).env("GIT_CEILING_DIRECTORIES", tree.parent().unwrap_or(tree));
                c
            } else {
                bail!("`patch` or `git` is needed to patch llama.cpp: install one of them");
            };
            cmd::output(apply.current_dir(tree)).with_context(|| format!("{} does not apply to the pinned llama.cpp", patch.display()))?;
        }
        for rel in &self.glue_files {
            fsutil::copy(&self.glue.join(rel), &tree.join(rel))?;
        }
        Ok(())
    }
}

/// Brings a tree up to date and returns its source folder.
pub fn prepare(layout: &Layout, pin: &Pin, tree: Tree, kind: SourceKind) -> Result<PathBuf> {
    let home = tree.home(layout);
    let (src, new, stamp) = (home.join("src"), home.join("src.new"), home.join("src.stamp"));
    let changes = match tree {
        Tree::Stock => None,
        Tree::Patched => Some(Changes::read(&layout.root)?),
    };
    let changes_hash = changes.as_ref().map_or(Ok(String::new()), Changes::hash)?;
    let wanted = fsutil::sha256_of(&[pin.commit.as_bytes(), changes_hash.as_bytes()]);

    let own = fetch::own_checkout(pin)?;
    if own.is_none() && src.is_dir() && fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
        return Ok(src);
    }
    let is_own = own.is_some();
    let source = own.map_or_else(|| fetch::pinned(layout, pin, kind), Ok)?;

    eprintln!("preparing {}", src.display());
    fsutil::remove_dir(&new)?;
    fetch::unpack(&source, &new)?;
    if let Some(changes) = changes {
        changes.apply(&new)?;
    }
    fs::write(&stamp, "").with_context(|| format!("cannot write {}", stamp.display()))?;
    if src.is_dir() {
        fsutil::mirror(&new, &src)?;
        fsutil::remove_dir(&new)?;
    } else {
        fs::rename(&new, &src).with_context(|| format!("cannot rename {}", new.display()))?;
    }
    // The user's own checkout can change at any time, so it is compared each time.
    if !is_own {
        fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))?;
    }
    Ok(src)
}
