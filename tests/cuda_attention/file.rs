//! Calls as `tests/cuda/call.h` reads them: numbers, then buffers, each of these with its bytes in front. Knows nothing of what is right.

use crate::common::Input;
use half::f16;
use spectral_kv::cache::Layer;
use spectral_kv::config::Scoring;
use spectral_kv::cuda::launch::Launch;
use spectral_kv::cuda::layer::SkvLayer;

/// Where heads lie in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Strides {
    #[default]
    Packed,
    /// Something else lies between heads, and between rows.
    Gaps,
    /// Rows of a head follow each other, as where ggml permutes.
    HeadsOuter,
}

/// What a call consists of.
pub struct Parts<'a> {
    pub layer: &'a Layer,
    pub scoring: Scoring,
    /// Query tokens.
    pub n: usize,
    pub multiprocessors: u32,
    /// Splits, if there shall be others than for so many multiprocessors.
    pub splits: Option<u32>,
    pub arena: &'a [u8],
    pub plan: &'a [i32],
    pub input: &'a Input,
    /// How many of the tokens bring rows.
    pub n_own: usize,
    pub strides: Strides,
    /// Its values, elements from a row to the next, cells that it covers. No values show all rows.
    pub mask: (&'a [f16], usize, usize),
    pub sinks: &'a [f32],
    /// What is right, and how far each query head may be off, relative to it. Nothing for a call to be timed.
    pub want: &'a [f64],
    pub bounds: &'a [f64],
    /// What a device has to read at least, in a call to be timed.
    pub bytes_to_read: usize,
}

impl Parts<'_> {
    pub fn to_bytes(&self) -> Vec<u8> {
        let (l, n, x) = (self.layer, self.n, self.input);
        let g = l.shape();
        let mut launch = Launch::new(g, l.geometry().tiles, n, self.multiprocessors).unwrap();
        if let Some(splits) = self.splits {
            launch.workspace_floats = launch.workspace_floats / launch.splits() as usize * splits as usize;
            launch.grid[0] = splits;
        }
        let rows = [(&x.q, n, g.n_head, g.d_k), (&x.k, self.n_own, g.n_head_kv, g.d_k), (&x.v, self.n_own, g.n_head_kv, g.d_v)];
        let mut file = CallFile::default();
        file.numbers(&[launch.columns]);
        file.numbers(&launch.grid.map(|x| x as usize));
        file.numbers(&[launch.shared_bytes, launch.combine_blocks as usize, launch.workspace_floats, n * g.n_head * g.d_v]);
        rows.iter().for_each(|(_, n, heads, d)| file.numbers(&strides(self.strides, *n, *heads, *d)));
        let (mask, mask_row, n_kv) = self.mask;
        file.numbers(&[mask_row, n_kv, n, self.bytes_to_read]);
        file.buffer(bytemuck::bytes_of(&SkvLayer::new(l.geometry(), l.index(), l.rope(), self.scoring)));
        file.buffer(self.arena);
        file.buffer(self.plan);
        rows.iter().for_each(|(x, n, heads, d)| file.buffer(&laid_out(x, self.strides, *n, *heads, *d)));
        file.buffer(bytemuck::cast_slice::<f16, u16>(mask));
        file.buffer(self.sinks);
        file.buffer(&narrow(self.want));
        file.buffer(&narrow(self.bounds));
        file.0
    }
}

/// Elements from a row to the next, and from a head to the next.
fn strides(of: Strides, n: usize, heads: usize, d: usize) -> [usize; 2] {
    match of {
        Strides::Packed => [heads * d, d],
        Strides::Gaps => [heads * (d + 3) + 5, d + 3],
        Strides::HeadsOuter => [d, n * d + 7],
    }
}

/// Rows as they lie in memory; what lies between is not a number.
fn laid_out(x: &[f32], of: Strides, n: usize, heads: usize, d: usize) -> Vec<f32> {
    let [row, head] = strides(of, n, heads, d);
    let mut out = vec![f32::NAN; if n == 0 { 0 } else { (n - 1) * row + (heads - 1) * head + d }];
    for (i, x) in x.chunks_exact(d).take(n * heads).enumerate() {
        out[i / heads * row + i % heads * head..][..d].copy_from_slice(x);
    }
    out
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

#[derive(Default)]
struct CallFile(Vec<u8>);

impl CallFile {
    fn numbers(&mut self, all: &[usize]) {
        all.iter().for_each(|x| self.0.extend_from_slice(&(*x as i64).to_le_bytes()));
    }

    fn buffer<T: bytemuck::NoUninit>(&mut self, x: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(x);
        self.numbers(&[bytes.len()]);
        self.0.extend_from_slice(bytes);
    }
}
