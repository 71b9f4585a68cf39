//! Where everything lies: the repository, cargo's target directory, and the folders for llama.cpp in it.
//!
//! Owns paths, the pin file and the lock. Must not know what is done in the folders.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

/// The folders this tool works in.
pub struct Layout {
    /// The repository: `vendor/`, `include/` and `tests/` are in it.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// `llama.cpp/` in the target directory; created, and free of symbolic links.
    pub work: PathBuf,
}

impl Layout {
    /// Finds the repository and the target directory, and creates the work folder.
    pub fn find() -> Result<Self> {
        // The package as cargo runs it, else as it was compiled. The repository is around it.
        let packages = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).into_iter().chain([env!("CARGO_MANIFEST_DIR").into()]);
        let Some(root) = packages.filter_map(|p| p.parent().map(Path::to_path_buf)).find(|r| r.join(PIN).is_file()) else {
            bail!("{PIN} is missing around {}: run this from a checkout of spectral-kv, with `cargo run --release -- …`", env!("CARGO_MANIFEST_DIR"));
        };
        let target = target_dir(&root);
        let work = target.join("llama.cpp");
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        // ccache compares paths as text, so they must be the real ones.
        let work = work.canonicalize().with_context(|| format!("cannot resolve {}", work.display()))?;
        Ok(Self { root, target, work })
    }

    /// Where downloads are kept.
    pub fn download(&self) -> PathBuf {
        self.work.join("download")
    }

    /// Where models are kept.
    pub fn models(&self) -> PathBuf {
        self.work.join("models")
    }

    /// Takes the lock that keeps two builds or downloads apart. It is held until the returned file is dropped.
    pub fn lock(&self) -> Result<File> {
        let path = self.work.join("lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if file.try_lock().is_err() {
            eprintln!("waiting for another spectral-kv that is building or fetching …");
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }
}

/// Cargo marks its target directory with a CACHEDIR.TAG, and the executable is somewhere below it.
fn target_dir(root: &Path) -> PathBuf {
    let exe = env::current_exe().unwrap_or_default();
    let marked = exe.ancestors().skip(1).find(|d| d.join("CACHEDIR.TAG").is_file());
    let asked = || env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    marked.map(Path::to_path_buf).or_else(asked).unwrap_or_else(|| root.join("target"))
}

const PIN: &str = "vendor/llama.cpp.commit";

/// Which llama.cpp the patch is for: the file [`PIN`] in the repository.
pub struct Pin {
    /// The commit, possibly abbreviated.
    pub commit: String,
    /// The git repository it is in.
    pub repo: String,
    /// A requirement `name==version` of a Python source distribution that contains the same tree.
    pub sdist: String,
    /// The checksum of that distribution.
    pub sdist_sha256: String,
}

impl Pin {
    /// Reads the pin of a repository.
    pub fn read(root: &Path) -> Result<Self> {
        let path = root.join(PIN);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let get = |key: &str| {
            text.lines()
                .filter_map(|l| l.trim().split_once('='))
                .find(|(k, _)| k.trim() == key)
                .map(|(_, v)| v.trim().to_string())
                .with_context(|| format!("no line `{key}=…`"))
        };
        let pin = Self {
            commit: get("commit")?,
            repo: get("repo")?,
            sdist: requirement(&get("sdist")?)?,
            sdist_sha256: get("sdist_sha256")?.to_lowercase(),
        };
        if pin.commit.len() < 7 || !pin.commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            bail!("`commit={}` is not a commit hash", pin.commit);
        }
        Ok(pin)
    }

    /// The Python project's name, without the version.
    pub fn sdist_name(&self) -> &str {
        self.sdist.split("==").next().unwrap_or(&self.sdist)
    }
}

/// Accepts `name==version` and the file name `name-version.tar.gz`.
fn requirement(s: &str) -> Result<String> {
    if s.contains("==") {
        return Ok(s.to_string());
    }
    let parts = s.strip_suffix(".tar.gz").and_then(|stem| stem.rsplit_once('-'));
    let (name, version) = parts.with_context(|| format!("`sdist={s}` is not name==version"))?;
    Ok(format!("{}=={version}", name.replace('_', "-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_forms_of_the_sdist() {
        for sdist in ["llama-cpp-python==1.2.3", "llama_cpp_python-1.2.3.tar.gz"] {
            let pin = Pin::parse(&format!("# x\ncommit=0123abc\nrepo=r\nsdist={sdist}\nsdist_sha256=AB\n")).unwrap();
            assert_eq!(pin.sdist, "llama-cpp-python==1.2.3");
            assert_eq!(pin.sdist_name(), "llama-cpp-python");
            assert_eq!(pin.sdist_sha256, "ab");
        }
    }

    #[test]
    fn names_what_is_missing() {
        let e = Pin::parse("commit=0123abc\nsdist=a==1\nsdist_sha256=x").err().unwrap();
        assert!(e.to_string().contains("repo="), "{e}");
        assert!(Pin::parse("commit=main\nrepo=r\nsdist=a==1\nsdist_sha256=x").is_err());
    }
}
