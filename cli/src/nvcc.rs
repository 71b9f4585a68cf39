//! The CUDA compiler, for who builds the library with the feature `cuda` and has no toolkit.
//!
//! Owns which packages it is made of, and puts them in one folder. Nothing of a package is run in the course of that. Must not know what is compiled.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

use super::layout::Layout;
use super::{cmd, fsutil, toolchain};

/// All of one release of CUDA: the assembler refuses what a newer compiler made.
const VERSION: &str = "13.0.88";
/// Compiler, its second half, and the headers of both and of the runtime.
const PACKAGES: [&str; 4] = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime"];
/// More headers, which CUDA's own include. They are numbered otherwise; these came with the same release.
const HEADERS: &str = "nvidia-cuda-cccl==13.0.85";
/// Where they put it.
const NVCC: &str = "nvidia/cu13/bin/nvcc";

/// The compiler: from an earlier download if there is one, else from the network. Fails with [`toolchain::Unreachable`] if pip does.
pub fn fetch(layout: &Layout) -> Result<PathBuf> {
    let folder = layout.work.join(format!("nvcc-{VERSION}"));
    let nvcc = folder.join(NVCC);
    if nvcc.is_file() {
        return Ok(nvcc);
    }
    let _lock = layout.lock()?;
    // Another run may have had the lock for the same download.
    if !nvcc.is_file() {
        install(&folder).context("cannot fetch the CUDA compiler")?;
    }
    if !cmd::runs(&nvcc, &["--version"]) {
        bail!("{} does not run: the packages of this platform have another layout", nvcc.display());
    }
    Ok(nvcc)
}

/// Only what is complete gets its name.
fn install(folder: &Path) -> Result<()> {
    eprintln!("fetching the CUDA compiler {VERSION} with pip, 100 MiB");
    let part = folder.with_file_name("nvcc.part");
    fsutil::remove_dir(&part)?;
    fsutil::remove_dir(folder)?;
    let mut pip = toolchain::pip()?;
    let packages: Vec<_> = PACKAGES.iter().map(|name| format!("{name}=={VERSION}")).chain([HEADERS.into()]).collect();
    // Wheels only, as they are: none of them has anything to be run.
    pip.args(["install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--target"]).arg(&part).args(&packages);
    cmd::output(&mut pip).map(drop).context(toolchain::Unreachable(packages.join(", ")))?;
    fs::rename(&part, folder).with_context(|| format!("cannot rename {}", part.display()))
}
