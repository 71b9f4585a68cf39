//! Files and folders: listing, comparing, copying, hashing.
//!
//! Must not know what the files are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// All files below `dir` (not the folders), as sorted relative paths; `skip` leaves out an entry and
/// everything below it. A symbolic link counts as a file.
pub fn files(dir: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(rel) = open.pop() {
        let at = dir.join(&rel);
        for entry in fs::read_dir(&at).with_context(|| format!("cannot list {}", at.display()))? {
            let entry = entry?;
            let rel = rel.join(entry.file_name());
            if skip(&rel) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                open.push(rel);
            } else {
                found.insert(rel);
            }
        }
    }
    Ok(found)
}

/// Copies one file and creates the folders above it. The copy's time is now, so a build sees it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let why = || format!("cannot copy {} to {}", from.display(), to.display());
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).with_context(why)?;
    }
    fs::copy(from, to).map(drop).with_context(why)
}

/// Makes `to` hold the same files as `from` and touches only what differs, so that a build of `to`
/// repeats only what it must.
pub fn mirror(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    let wanted = files(from, &|_| false)?;
    for rel in files(to, &|_| false)?.difference(&wanted) {
        let old = to.join(rel);
        fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    for rel in &wanted {
        let (new, old) = (from.join(rel), to.join(rel));
        let same = fs::read(&old).is_ok_and(|o| fs::read(&new).is_ok_and(|n| n == o));
        if !same {
            copy(&new, &old)?;
        }
    }
    Ok(())
}

/// Removes a folder and what is in it, if it is there.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("cannot remove {}", dir.display())),
        _ => Ok(()),
    }
}

/// The SHA-256 of a file, in lower-case hexadecimal digits.
pub fn sha256(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    io::copy(&mut file, &mut hash).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(hash))
}

/// The SHA-256 of several byte strings, kept apart by their lengths.
pub fn sha256_of(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_changes_only_what_differs() {
        let dir = std::env::temp_dir().join(format!("spectral-kv-mirror-{}", std::process::id()));
        let (a, b) = (dir.join("a"), dir.join("b"));
        remove_dir(&dir).unwrap();
        for (path, text) in [("a/x/same", "1"), ("a/new", "2"), ("a/edited", "3"), ("b/x/same", "1"), ("b/edited", "9"), ("b/x/gone", "4")] {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs::write(dir.join(path), text).unwrap();
        }
        let old = fs::metadata(b.join("x/same")).unwrap().modified().unwrap();
        mirror(&a, &b).unwrap();
        assert_eq!(files(&a, &|_| false).unwrap(), files(&b, &|_| false).unwrap());
        assert_eq!(fs::read_to_string(b.join("edited")).unwrap(), "3");
        assert_eq!(fs::metadata(b.join("x/same")).unwrap().modified().unwrap(), old);
        remove_dir(&dir).unwrap();
    }

    #[test]
    fn parts_are_kept_apart() {
        assert_ne!(sha256_of(&[b"ab", b"c"]), sha256_of(&[b"a", b"bc"]));
    }
}
