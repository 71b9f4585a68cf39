//! The program that carries out steps: `tests/cuda/store.cpp`, on the host shim. Knows what it reads, and nothing of what is right.

use crate::common::Input;
use crate::{programs, shim};
use programs::{scratch, succeed};
use spectral_kv::cache::Layer;
use spectral_kv::cuda::launch::StoreLaunch;
use spectral_kv::cuda::layer::SkvLayer;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::OnceLock;

const SOURCE: &str = "tests/cuda/store.cpp";

/// Under sanitizers.
pub fn sanitized() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| shim::build(SOURCE))
}

/// With an eye on races in shared memory.
pub fn watched() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| shim::build_watched(SOURCE))
}

/// A step for the program: all layers' parts of it.
pub struct StepFile {
    bytes: Vec<u8>,
}

impl StepFile {
    pub fn new(arena: &[u8], plan: &[i32], layers: usize) -> Self {
        let mut file = StepFile { bytes: Vec::new() };
        file.buffer(arena);
        file.buffer(plan);
        file.numbers(&[layers]);
        file
    }

    /// What a layer gets of `n` tokens, and rows of the residual stream, which may be missing. `turn` chooses how rows lie in memory.
    pub fn layer(&mut self, l: &Layer, input: &Input, n: usize, residual: &[f32], turn: u64) {
        let g = l.shape();
        let launch = StoreLaunch::new(g).unwrap();
        self.numbers(&[launch.blocks as usize, launch.shared_bytes]);
        let all = [(&input.q, g.n_head, g.d_k), (&input.k, g.n_head_kv, g.d_k), (&input.v, g.n_head_kv, g.d_v)];
        let strides = all.map(|(_, heads, d)| match turn % 3 {
            0 => (heads * d, d),
            1 => (heads * (d + 3) + 5, d + 3),
            // Rows of a head follow each other, as where ggml permutes.
            _ => (d, n * d + 7),
        });
        strides.iter().for_each(|(row, head)| self.numbers(&[*row, *head]));
        let wide = residual.len() / n.max(1);
        self.numbers(&[wide, wide, n]);
        self.buffer(bytemuck::bytes_of(&SkvLayer::new(l.geometry(), l.index(), l.rope(), l.scoring())));
        for ((x, heads, d), (row, head)) in all.into_iter().zip(strides) {
            let mut laid = vec![f32::NAN; if n == 0 { 0 } else { (n - 1) * row + (heads - 1) * head + d }];
            for (i, x) in x[..n * heads * d].chunks_exact(d).enumerate() {
                laid[i / heads * row + i % heads * head..][..d].copy_from_slice(x);
            }
            self.buffer(&laid);
        }
        self.buffer(residual);
    }

    fn numbers(&mut self, all: &[usize]) {
        all.iter().for_each(|x| self.bytes.extend_from_slice(&(*x as i64).to_le_bytes()));
    }

    fn buffer<T: bytemuck::NoUninit>(&mut self, x: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(x);
        self.numbers(&[bytes.len()]);
        self.bytes.extend_from_slice(bytes);
    }

    /// The arena afterwards.
    pub fn run(self, program: &Path) -> Vec<u8> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let paths = ["step", "arena"].map(|kind| scratch(&format!("store.{}.{number}.{kind}", std::process::id())));
        std::fs::write(&paths[0], &self.bytes).unwrap();
        succeed(Command::new(program).args(&paths).env("UBSAN_OPTIONS", "print_stacktrace=1"));
        let arena = std::fs::read(&paths[1]).unwrap();
        paths.iter().for_each(|p| std::fs::remove_file(p).unwrap());
        arena
    }
}
