//! ggml's CPU backend in this process: numbers in, one operation, numbers out. Must not know what they are compared with.

use super::bindings::{ggml_context, ggml_init_params, ggml_tensor, ggml_type, Ggml};
use super::bindings::{GGML_ROPE_TYPE_NEOX, GGML_STATUS_SUCCESS, GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_I32};
use bytemuck::NoUninit;
use half::f16;
use spectral_kv::rope::{Pairing, RopeParams};
use std::ffi::c_int;
use std::path::Path;
use std::ptr::{copy_nonoverlapping, null_mut};

/// Memory of a call beside its inputs: the result, what ggml works in, and its own records.
const REST: usize = 64 << 20;

/// The functions of ggml that are used.
pub struct Backend(Ggml);

/// One call of `ggml_flash_attn_ext`.
pub struct Attention<'a> {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub d_k: usize,
    pub d_v: usize,
    /// Roped, `[token][head][d_k]`.
    pub q: &'a [f32],
    /// Roped, `[row][head][d_k]`.
    pub k: &'a [f16],
    /// `[row][head][d_v]`.
    pub v: &'a [f16],
    /// `[token][row]`, added to the scores.
    pub mask: &'a [f16],
    /// One per query head, or none.
    pub sinks: &'a [f32],
    pub scale: f32,
    pub softcap: f32,
}

impl Backend {
    /// The one in a folder with llama.cpp's libraries.
    pub fn load(dir: &Path) -> Self {
        let file = dir.join(libloading::library_filename("ggml-cpu"));
        // SAFETY: the libraries are built from the sources that the bindings are made from; what they do when they are loaded has no conditions.
        // Symbols of libggml-base are found through this one, which needs it.
        Backend(unsafe { Ggml::new(&file) }.unwrap_or_else(|e| panic!("{}: {e}", file.display())))
    }

    /// `[token][head][d_v]`, with keys and values in f16, as llama.cpp holds them.
    pub fn attend_f16(&self, a: &Attention) -> Vec<f32> {
        self.attend(a, |graph, x, shape| graph.tensor(GGML_TYPE_F16, shape, x))
    }

    /// The same of the same numbers in f32: ggml then rounds neither queries nor sums to f16.
    pub fn attend_f32(&self, a: &Attention) -> Vec<f32> {
        let wide = |x: &[f16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        self.attend(a, |graph, x, shape| graph.tensor(GGML_TYPE_F32, shape, &wide(x)))
    }

    fn attend(&self, a: &Attention, held: impl Fn(&Graph, &[f16], [usize; 3]) -> *mut ggml_tensor) -> Vec<f32> {
        let (n, rows) = (a.q.len() / (a.n_head * a.d_k), a.k.len() / (a.n_head_kv * a.d_k));
        let graph = Graph::new(&self.0, 4 * (a.q.len() + a.k.len() + a.v.len() + a.mask.len()));
        let q = graph.heads_outside(graph.tensor(GGML_TYPE_F32, [a.d_k, a.n_head, n], a.q));
        let k = graph.heads_outside(held(&graph, a.k, [a.d_k, a.n_head_kv, rows]));
        let v = graph.heads_outside(held(&graph, a.v, [a.d_v, a.n_head_kv, rows]));
        let mask = graph.tensor(GGML_TYPE_F16, [rows, n, 1], a.mask);
        let (ggml, context) = (&self.0, graph.context);
        // SAFETY: all tensors are of this context, with the shapes and types that the operation is documented to take.
        let out = unsafe { ggml.ggml_flash_attn_ext(context, q, k, v, mask, a.scale, 0.0, a.softcap) };
        if !a.sinks.is_empty() {
            let sinks = graph.tensor(GGML_TYPE_F32, [a.sinks.len(), 1, 1], a.sinks);
            // SAFETY: the operation above, and a tensor of one float for each query head.
            unsafe { ggml.ggml_flash_attn_ext_add_sinks(out, sinks) };
        }
        graph.compute(out, n * a.n_head * a.d_v)
    }

    /// `ggml_rope_ext` of `x[row][head][d]`. The factor by which YaRN lengthens keys is taken out: it is a property of the keys that come in.
    pub fn rope(&self, p: &RopeParams, positions: &[i32], d: usize, x: &[f32]) -> Vec<f32> {
        if p.pairing == Pairing::None {
            return x.to_vec();
        }
        assert_eq!(p.offset, 0, "ggml ropes the first elements of a head");
        let graph = Graph::new(&self.0, 4 * (x.len() + positions.len() + p.freq_factors.len()));
        let rows = graph.tensor(GGML_TYPE_F32, [d, x.len() / (positions.len() * d), positions.len()], x);
        let at = graph.tensor(GGML_TYPE_I32, [positions.len(), 1, 1], positions);
        let factors = match &p.freq_factors[..] {
            [] => null_mut(),
            some => graph.tensor(GGML_TYPE_F32, [some.len(), 1, 1], some),
        };
        let mode = if p.pairing == Pairing::Halves { GGML_ROPE_TYPE_NEOX as c_int } else { 0 };
        let length = if p.ext_factor == 0.0 { 1.0 } else { 1.0 / (1.0 + 0.1 * (1.0 / p.freq_scale).ln()) };
        // SAFETY: all tensors are of this context; one position for each row, one factor for each pair.
        let out = unsafe {
            self.0.ggml_rope_ext(
                graph.context,
                rows,
                at,
                factors,
                p.n_dims as c_int,
                mode,
                p.n_ctx_orig as c_int,
                p.freq_base,
                p.freq_scale,
                p.ext_factor,
                length,
                p.beta_fast,
                p.beta_slow,
            )
        };
        graph.compute(out, x.len())
    }
}

/// A context of ggml's, for one operation.
struct Graph<'a> {
    ggml: &'a Ggml,
    context: *mut ggml_context,
}

impl<'a> Graph<'a> {
    fn new(ggml: &'a Ggml, bytes: usize) -> Self {
        // SAFETY: without a buffer ggml allocates the memory itself.
        let context = unsafe { ggml.ggml_init(ggml_init_params { mem_size: bytes + REST, mem_buffer: null_mut(), no_alloc: false }) };
        assert!(!context.is_null(), "ggml_init of {bytes} bytes");
        Graph { ggml, context }
    }

    /// A tensor with its numbers, innermost dimension first.
    fn tensor<T: NoUninit>(&self, kind: ggml_type, shape: [usize; 3], values: &[T]) -> *mut ggml_tensor {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{shape:?}");
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let [a, b, c] = shape.map(|x| x as i64);
        // SAFETY: a new tensor of this context has room for its shape, which is that of the values, and each kind is given values of its size.
        unsafe {
            let tensor = self.ggml.ggml_new_tensor_4d(self.context, kind, a, b, c, 1);
            assert_eq!(self.ggml.ggml_nbytes(tensor), bytes.len());
            copy_nonoverlapping(bytes.as_ptr(), self.ggml.ggml_get_data(tensor).cast::<u8>(), bytes.len());
            tensor
        }
    }

    /// `[row][head][d]` seen as `[head][row][d]`, as llama.cpp does.
    fn heads_outside(&self, rows: *mut ggml_tensor) -> *mut ggml_tensor {
        // SAFETY: a tensor of this context; the axes are a permutation.
        unsafe { self.ggml.ggml_permute(self.context, rows, 0, 2, 1, 3) }
    }

    /// The `n` floats of a result.
    fn compute(self, result: *mut ggml_tensor, n: usize) -> Vec<f32> {
        // SAFETY: graph and result are of this context, which lives until the end of this call, and has been given memory to work in; the result's floats
        // are read within its size.
        unsafe {
            let graph = self.ggml.ggml_new_graph(self.context);
            self.ggml.ggml_build_forward_expand(graph, result);
            assert_eq!(self.ggml.ggml_graph_compute_with_ctx(self.context, graph, 1), GGML_STATUS_SUCCESS);
            assert_eq!(self.ggml.ggml_nbytes(result), 4 * n);
            std::slice::from_raw_parts(self.ggml.ggml_get_data(result).cast::<f32>(), n).to_vec()
        }
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: made by ggml_init, and nothing that was read from it is left.
        unsafe { self.ggml.ggml_free(self.context) };
    }
}
