//! Finished parts of an evaluation, kept as files, so that an interrupted one goes on where it was.
//!
//! A part's file is named by a hash of everything that its numbers depend on. Must not know what is in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::fsutil;

/// A folder of parts.
pub struct Parts {
    dir: PathBuf,
    common: String,
}

impl Parts {
    /// Parts that all depend on `common`.
    pub fn open(dir: &Path, common: &[&[u8]]) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self { dir: dir.into(), common: fsutil::sha256_of(common) })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, label: &str, depends: &[&[u8]]) -> PathBuf {
        let hash = fsutil::sha256_of(&[&[self.common.as_bytes(), label.as_bytes()], depends].concat());
        self.dir.join(format!("{label}-{}.json", &hash[..16]))
    }

    /// Whether a part is there already.
    pub fn has(&self, label: &str, depends: &[&[u8]]) -> bool {
        self.path(label, depends).is_file()
    }

    /// A part: from its file, or made and kept. What is returned was read in both cases, so that a number that
    /// changes in writing is the same number in a later run.
    pub fn get<T: Serialize + DeserializeOwned>(&self, label: &str, depends: &[&[u8]], make: impl FnOnce() -> Result<T>) -> Result<T> {
        let path = self.path(label, depends);
        if !path.is_file() {
            let text = serde_json::to_string(&make()?)?;
            // Under another name first: a file with the right name is complete.
            let new = path.with_extension("new");
            fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged: remove it", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_made_once_and_read_the_same() {
        let dir = std::env::temp_dir().join(format!("spectral-kv-parts-{}", std::process::id()));
        fsutil::remove_dir(&dir).unwrap();
        let numbers: Vec<f64> = (1..200).map(|i| 1.0 / f64::from(i * i * i) * 10f64.powi(i % 40 - 30)).collect();
        let open = |common: &str| Parts::open(&dir, &[common.as_bytes()]).unwrap();
        let first: Vec<f64> = open("model").get("a", &[b"x"], || Ok(numbers)).unwrap();
        let again: Vec<f64> = open("model").get("a", &[b"x"], || panic!("made twice")).unwrap();
        assert_eq!(serde_json::to_string(&first).unwrap(), serde_json::to_string(&again).unwrap());
        for (common, label, depends) in [("other", "a", "x"), ("model", "b", "x"), ("model", "a", "y")] {
            assert!(!open(common).has(label, &[depends.as_bytes()]), "{common} {label} {depends}");
        }
        // A failure leaves nothing behind.
        assert!(open("model").get::<u8>("b", &[], || anyhow::bail!("no")).is_err());
        assert!(!open("model").has("b", &[]));
        fsutil::remove_dir(&dir).unwrap();
    }
}
