//! Configures and compiles a tree, with a progress bar.
//!
//! Owns the cmake options and the list of tools. Must not know how a tree came to be.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};

use super::fetch::SourceKind;
use super::layout::{Layout, Pin};
use super::progress::Progress;
use super::toolchain::{self, Tools};
use super::{cmd, tree};

pub use super::tree::Tree;

const PREFIX: &str = "llama-";
const TOOLS: [&str; 7] =
    ["llama-cli", "llama-completion", "llama-server", "llama-perplexity", "llama-bench", "llama-batched-bench", super::probe::TOOL];
/// What the stock tree is for: comparisons.
const STOCK_TOOLS: [&str; 4] = ["llama-completion", "llama-perplexity", "llama-bench", "llama-batched-bench"];

/// A build to be made.
pub struct Request {
    /// Which tree.
    pub tree: Tree,
    /// Which tools, by their full names; none stands for all that the tree is used for.
    pub targets: Vec<&'static str>,
    /// Where the sources come from.
    pub source: SourceKind,
    /// How many compilers at once; one per core if not given.
    pub jobs: Option<u32>,
}

/// The full name of a tool that may have been given without `llama-`.
pub fn tool_name(given: &str) -> Result<&'static str> {
    let short = given.strip_prefix(PREFIX).unwrap_or(given);
    match TOOLS.into_iter().find(|t| t.strip_prefix(PREFIX) == Some(short)) {
        Some(name) => Ok(name),
        None => bail!("there is no tool `{given}` here; the tools are {}", TOOLS.join(", ")),
    }
}

/// Makes sure that the tools are built from the present sources; returns the folder they are in.
pub fn ensure(request: &Request) -> Result<PathBuf> {
    let layout = Layout::find()?;
    let pin = Pin::read(&layout.root)?;
    let _lock = layout.lock()?;
    let home = request.tree.home(&layout);
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let src = tree::prepare(&layout, &pin, request.tree, request.source)?;
    let library = match request.tree {
        Tree::Stock => None,
        Tree::Patched => Some(toolchain::static_library(&layout)?),
    };
    let tools = Tools::find(&layout)?;
    let build = Build { home: &home, base: cache_base(&layout), cmake: &tools.cmake };
    build.configure(&options(&layout, &pin, &tools, &src, library.as_deref()))?;

    let targets = match (request.targets.as_slice(), request.tree) {
        ([], Tree::Stock) => &STOCK_TOOLS[..],
        ([], Tree::Patched) => &TOOLS[..],
        (given, _) => given,
    };
    build.compile(targets, request.jobs)?;
    Ok(build.dir().join("bin"))
}

fn options(layout: &Layout, pin: &Pin, tools: &Tools, src: &Path, library: Option<&Path>) -> Vec<String> {
    let mut args: Vec<String> = [
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        // Relative paths in the files that cmake makes, for ccache; older cmakes ignore it.
        "-DCMAKE_UNITY_BUILD_RELOCATABLE=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_BUILD_NUMBER=0",
    ]
    .map(String::from)
    .to_vec();
    args.push(format!("-DLLAMA_BUILD_COMMIT={}", pin.commit));
    if tools.ninja.is_absolute() {
        args.push(format!("-DCMAKE_MAKE_PROGRAM={}", tools.ninja.display()));
    }
    if let Some(library) = library {
        args.push("-DLLAMA_KV_SPECTRAL=ON".into());
        args.push(format!("-DLLAMA_KV_SPECTRAL_LIB={}", library.display()));
        args.push(format!("-DLLAMA_KV_SPECTRAL_INCLUDE={}", layout.root.join("include").display()));
    }
    args.extend(["-S".into(), src.display().to_string()]);
    args
}

/// What ccache takes as the start of relative paths: it must be above the sources, the build and,
/// where that is possible, the header of the library.
fn cache_base(layout: &Layout) -> PathBuf {
    match layout.root.canonicalize() {
        Ok(root) if layout.work.starts_with(&root) => root,
        _ => layout.work.clone(),
    }
}

struct Build<'a> {
    home: &'a Path,
    base: PathBuf,
    cmake: &'a Path,
}

impl Build<'_> {
    fn dir(&self) -> PathBuf {
        self.home.join("build")
    }

    fn log(&self) -> PathBuf {
        self.home.join("build.log")
    }

    fn command(&self) -> Command {
        let mut cmake = Command::new(self.cmake);
        cmake.env("CCACHE_BASEDIR", &self.base).env("CCACHE_NOHASHDIR", "1");
        // The commit of the repository around the target folder is not llama.cpp's.
        cmake.env("GIT_CEILING_DIRECTORIES", self.home);
        cmake
    }

    /// Runs cmake if it has not run with these options yet. Later changes of the tree are ninja's affair.
    fn configure(&self, options: &[String]) -> Result<()> {
        let stamp = self.home.join("configure.stamp");
        let wanted = format!("{}\n{}\n", self.cmake.display(), options.join("\n"));
        if self.dir().join("build.ninja").is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
            return Ok(());
        }
        let mut cmake = self.command();
        cmake.args(options).arg("-B").arg(self.dir());
        cmd::output(&mut cmake).context("cannot configure llama.cpp (a C and a C++ compiler are needed)")?;
        fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
    }

    fn compile(&self, targets: &[&str], jobs: Option<u32>) -> Result<()> {
        let mut cmake = self.command();
        cmake.arg("--build").arg(self.dir()).arg("--target").args(targets).env("NINJA_STATUS", "[%f/%t] ");
        if let Some(jobs) = jobs {
            cmake.arg("--parallel").arg(jobs.to_string());
        }
        let status = self.follow(&mut cmake).with_context(|| format!("cannot run `{}`", cmd::shown(&cmake)))?;
        if !status.success() {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            bail!("`{}` failed ({status}); the end of {}:\n{}", cmd::shown(&cmake), self.log().display(), cmd::tail(&log, 40));
        }
        Ok(())
    }

    /// Runs the build, keeps its output in the log, and shows how far it is.
    fn follow(&self, cmake: &mut Command) -> io::Result<std::process::ExitStatus> {
        let mut log = File::create(self.log())?;
        let (output, input) = io::pipe()?;
        cmake.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
        let mut child = cmake.spawn()?;
        // The command holds the pipe's writing end; without it the reading below comes to an end.
        cmake.stdout(Stdio::null()).stderr(Stdio::null());
        let mut progress = Progress::new("building llama.cpp".into(), "", SMALL);
        let mut lines = BufReader::new(output);
        let mut line = vec![];
        while lines.read_until(b'\n', &mut line)? > 0 {
            log.write_all(&line)?;
            if let Some((done, total, what)) = step(&String::from_utf8_lossy(&line)) {
                progress.at(done, total, what.rsplit('/').next().unwrap_or(what));
            }
            line.clear();
        }
        progress.end();
        child.wait()
    }
}

/// Splits ninja's `[done/total] what`.
fn step(line: &str) -> Option<(u64, u64, &str)> {
    let (count, what) = line.strip_prefix('[')?.split_once("] ")?;
    let (done, total) = count.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?, what.trim()))
}

/// Builds of fewer steps are over before a line about them is read.
const SMALL: u64 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_known_by_both_names() {
        assert_eq!(tool_name("bench").unwrap(), "llama-bench");
        assert_eq!(tool_name("llama-cli").unwrap(), "llama-cli");
        let e = tool_name("quantize").unwrap_err().to_string();
        assert!(e.contains("quantize") && e.contains("llama-batched-bench"), "{e}");
    }

    #[test]
    fn reads_ninja_steps() {
        assert_eq!(step("[3/120] Building CXX object a/b.o\n"), Some((3, 120, "Building CXX object a/b.o")));
        assert_eq!(step("ninja: no work to do.\n"), None);
        assert_eq!(step("[x/2] y"), None);
    }
}
