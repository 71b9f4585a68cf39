//! The client of `llama-kv-spectral-probe`, the remote control of llama.cpp: several contexts over one model, decoded
//! token by token, with their logits, KV rows and attention tensors in reach.
//!
//! Owns the process and the wire: a line of JSON that may announce a number of bytes, then these bytes, in both
//! directions. Must not know what the calls are made for.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{bail, Context as _, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use super::cmd;

/// The name of the program.
pub const TOOL: &str = "llama-kv-spectral-probe";

/// The heads of a layer; all zero where a layer has no attention.
#[derive(Clone, Debug, Deserialize)]
pub struct LayerInfo {
    /// Query heads.
    pub n_head: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Elements of a key (and of a query).
    pub d_k: usize,
    /// Elements of a value.
    pub d_v: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Soft cap of the scores, 0 for none.
    pub softcap: f32,
    /// How the spectral cache sees the rotation of the keys; `None` where it stores them as they are.
    pub rope: Option<RopeInfo>,
}

/// How the first rotated layer rotates its keys, as its graph says and as the spectral cache is told.
#[derive(Clone, Debug, Deserialize)]
pub struct RopeInfo {
    /// Pairs are (i, i + n_rot/2), not (2i, 2i + 1).
    pub neox: bool,
    /// Elements of a head that are rotated; 0 where keys are stored as they are.
    pub n_rot: usize,
    /// The first of these elements.
    pub offset: usize,
    /// Base of the frequencies.
    pub freq_base: f32,
    /// Factor on the positions.
    pub freq_scale: f32,
    /// YaRN: the context size of the training.
    pub n_ctx_orig: usize,
    /// YaRN: how much of the extrapolation is mixed in; 0 switches YaRN off.
    pub ext_factor: f32,
    /// YaRN: rotations above which a pair is extrapolated.
    pub beta_fast: f32,
    /// YaRN: rotations below which a pair is interpolated.
    pub beta_slow: f32,
    /// Divisors of the frequencies, one per pair; empty where there are none.
    pub freq_factors: Vec<f32>,
}

/// What the evaluation of a model needs to know about it.
#[derive(Clone, Debug, Deserialize)]
pub struct ModelInfo {
    /// llama.cpp's words for it.
    pub description: String,
    /// Tells it from other models; the same for every quantisation of it.
    pub hash: u64,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// The context size of the training.
    pub n_ctx_train: usize,
    /// All layers, also those without attention.
    pub layers: Vec<LayerInfo>,
    /// The token that the model wants before each text, if any.
    pub bos: Option<i32>,
    /// The rotation of the keys.
    pub rope: RopeInfo,
}

/// How a context holds its KV rows.
#[derive(Clone, Debug)]
pub enum Cache {
    /// llama.cpp's own cache, with flash attention.
    Stock {
        /// Type of the keys, such as `f16` or `q4_0`.
        k: String,
        /// Type of the values.
        v: String,
        /// Whether quantised rows go through llama.cpp's Hadamard rotation, as they do by default.
        rotate: bool,
    },
    /// The spectral cache.
    Spectral {
        /// f16 bytes per byte held.
        ratio: f32,
        /// Code bits per element; 0 = from the ratio.
        bits: f32,
        /// Most recent rows that stay exact.
        window: u32,
        /// Rows behind the window that are kept most finely, if not as many as the context size says.
        fine: Option<u32>,
        /// A file of `spectral-kv calibrate`, if bases are not to be fitted.
        basis: Option<PathBuf>,
    },
}

/// A context to be opened.
#[derive(Clone, Debug)]
pub struct ContextSpec {
    /// Positions; llama.cpp may round up.
    pub n_ctx: u32,
    /// Tokens that go through the graph at once.
    pub n_ubatch: u32,
    /// Its cache.
    pub cache: Cache,
    /// What is kept of a decode beside its logits.
    pub keep: Keep,
}

/// What a context keeps beside its cache, for [`Probe::captured`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// The attention tensors of the last decode, and in stock caches the sums that the judged tokens' attention goes into.
    Tensors,
    /// The tensors, and all rows as they came in, in f16: against them the judged tokens' attention is held.
    ExactRows,
}

/// An open context. It stays open until [`Probe::close`] or the end of the process.
#[derive(Clone, Debug, Deserialize)]
pub struct Context {
    /// Its number in the process.
    pub id: usize,
    /// Bytes of the KV cache: tensors, and tables of a spectral one.
    pub bytes_held: u64,
    /// Code bits per element of a spectral cache.
    pub code_bits: Option<f64>,
    /// Bytes of an f16 cache of this size per byte held.
    pub ratio: f64,
}

/// Which tokens' logits a decode returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None.
    None,
    /// The last one's.
    Last,
    /// All.
    All,
}

/// Half of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

/// What [`Probe::captured`] can return. With llama.cpp's Hadamard rotation, queries, keys and values are rotated; the
/// attention output never is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// Queries after RoPE, of the query heads.
    Queries,
    /// Keys after RoPE, as they enter the cache, of the KV heads.
    Keys,
    /// Values as they enter the cache, of the KV heads.
    Values,
    /// Output of the attention before the output projection, of the query heads.
    Attention,
    /// Not of a decode: the rows of the layer's output projection, over all heads' outputs. Only of a stock cache.
    Output,
    /// The sum of residual stream and attention, of the judged tokens. Only of a stock cache.
    Joined,
    /// What the cache's codes change in the output of the attention of the judged tokens, `[token][whole, values][head][element]`:
    /// all of it, and the part of the values, which is what coded values change under the weights that exact keys give them. Only
    /// with [`Keep::ExactRows`], and not of layers with attention sinks.
    Errors,
}

/// A step between a layer's output projection and the residual stream. Vectors are in the numbers that come with the steps.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum BranchStep {
    /// A vector is added.
    Add {
        /// Its length.
        n: usize,
    },
    /// Each element has its factor.
    Mul {
        /// How many there are.
        n: usize,
    },
    /// One factor and one shift for all.
    Scale {
        /// The factor.
        by: f32,
        /// The shift.
        plus: f32,
    },
    /// Division by the root of the mean square.
    RmsNorm {
        /// What is added to the mean square.
        eps: f32,
    },
    /// The same around the mean.
    Norm {
        /// What is added to the variance.
        eps: f32,
    },
}

/// How the weights of a model are stored when they are widened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// 16 bits; what is multiplied with them is rounded to f16.
    F16,
    /// 32 bits; nothing is rounded.
    F32,
}

/// Writes a model with wider weights: what is multiplied with quantised ones is quantised too.
pub fn widen(bin_dir: &Path, model: &Path, weights: Weights, out: &Path) -> Result<()> {
    let option = if weights == Weights::F16 { "--f16" } else { "--f32" };
    cmd::output(Command::new(bin_dir.join(TOOL)).arg("-m").arg(model).arg(option).arg(out)).map(drop)
}

/// A running `llama-kv-spectral-probe` with a model.
pub struct Probe {
    wire: Wire,
    info: ModelInfo,
}

impl Probe {
    /// Starts the program in `bin_dir` and loads a model.
    pub fn start(bin_dir: &Path, model: &Path, threads: usize) -> Result<Self> {
        let mut wire = Wire::open(Command::new(bin_dir.join(TOOL)).arg("-m").arg(model).args(["-t", &threads.to_string()]))?;
        let info = wire.ask(json!({"cmd": "info"}))?;
        Ok(Self { wire, info })
    }

    /// The model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The tokens of a text; names of special tokens in it stand for these tokens. `add_special` adds what the model wants
    /// around a text, such as BOS.
    pub fn tokenize(&mut self, text: &str, add_special: bool) -> Result<Vec<i32>> {
        let (_, tokens) = self.wire.call(json!({"cmd": "tokenize", "add_special": add_special}), text.as_bytes())?;
        numbers(&tokens)
    }

    /// The text of tokens, special ones included; what is no UTF-8 by itself is replaced.
    pub fn detokenize(&mut self, tokens: &[i32]) -> Result<String> {
        let (_, text) = self.wire.call(json!({"cmd": "detokenize"}), bytemuck::cast_slice(tokens))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Opens a context beside those that are open.
    pub fn open(&mut self, spec: &ContextSpec) -> Result<Context> {
        let cache = match &spec.cache {
            Cache::Stock { k, v, rotate } => json!({"k": k, "v": v, "rotate": rotate}),
            Cache::Spectral { ratio, bits, window, fine, basis } => {
                let mut cache = json!({"ratio": ratio, "bits": bits, "window": window});
                if let Some(fine) = fine {
                    cache["fine"] = json!(fine);
                }
                if let Some(basis) = basis {
                    cache["basis"] = json!(basis);
                }
                cache
            }
        };
        let (capture, exact) = (spec.keep != Keep::Nothing, spec.keep == Keep::ExactRows);
        let command = json!({"cmd": "open", "n_ctx": spec.n_ctx, "n_ubatch": spec.n_ubatch, "capture": capture, "exact": exact, "cache": cache});
        self.wire.ask(command)
    }

    /// Frees a context.
    pub fn close(&mut self, context: &Context) -> Result<()> {
        self.wire.call(json!({"cmd": "close", "id": context.id}), &[]).map(drop)
    }

    /// Forgets all tokens of a context.
    pub fn clear(&mut self, context: &Context) -> Result<()> {
        self.wire.call(json!({"cmd": "clear", "id": context.id}), &[]).map(drop)
    }

    /// Appends tokens at the context's position, in ubatches. Returns the wanted logits, `n_vocab` per token. After an error
    /// the context is where it was, or empty where that cannot be.
    ///
    /// `judged` are places of tokens among these, in ascending order.
    pub fn decode(&mut self, context: &Context, tokens: &[i32], want: Want, judged: &[usize]) -> Result<Vec<f32>> {
        let want = match want {
            Want::None => "none",
            Want::Last => "last",
            Want::All => "all",
        };
        let command = json!({"cmd": "decode", "id": context.id, "want": want, "judge": judged});
        let (_, logits) = self.wire.call(command, bytemuck::cast_slice(tokens))?;
        numbers(&logits)
    }

    /// Keeps positions 0 to n, without n.
    pub fn truncate(&mut self, context: &Context, n: usize) -> Result<()> {
        self.wire.call(json!({"cmd": "truncate", "id": context.id, "n": n}), &[]).map(drop)
    }

    /// The stored rows of positions `first` to `first + n` of a stock f16 cache, `[row][KV head][element]`.
    pub fn rows(&mut self, context: &Context, layer: usize, side: Side, first: usize, n: usize) -> Result<Vec<f32>> {
        let (_, rows) = self.wire.call(json!({"cmd": "rows", "id": context.id, "layer": layer, "side": side.word(), "first": first, "n": n}), &[])?;
        numbers(&rows)
    }

    /// Replaces stored rows of a stock f16 cache from position `first` on; they are rounded to f16.
    pub fn set_rows(&mut self, context: &Context, layer: usize, side: Side, first: usize, rows: &[f32]) -> Result<()> {
        let command = json!({"cmd": "set_rows", "id": context.id, "layer": layer, "side": side.word(), "first": first});
        self.wire.call(command, bytemuck::cast_slice(rows)).map(drop)
    }

    /// What lies between a layer's output projection and the residual stream: its steps, and the numbers that they need, one after
    /// the other. Only of a stock cache.
    pub fn branch(&mut self, context: &Context, layer: usize) -> Result<(Vec<BranchStep>, Vec<f32>)> {
        let (answer, data) = self.wire.call(json!({"cmd": "branch", "id": context.id, "layer": layer}), &[])?;
        let steps = serde_json::from_value(answer["steps"].clone()).context("the steps behind an attention are not understood")?;
        Ok((steps, numbers(&data)?))
    }

    /// A tensor of the last decode, `[token][head][element]`.
    pub fn captured(&mut self, context: &Context, layer: usize, tensor: Tensor) -> Result<Vec<f32>> {
        let (_, data) = self.wire.call(json!({"cmd": "captured", "id": context.id, "layer": layer, "tensor": tensor.word()}), &[])?;
        numbers(&data)
    }
}

/// The process and the pipes to it.
struct Wire {
    name: String,
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    log: Option<JoinHandle<String>>,
}

impl Wire {
    fn open(command: &mut Command) -> Result<Self> {
        let name = cmd::shown(command);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.with_context(|| format!("cannot run `{name}`"))?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(to), Some(from), Some(log)) = pipes else { bail!("`{name}` has no pipes") };
        let log = Some(std::thread::spawn(move || end_of(log)));
        Ok(Self { name, child, to: Some(to), from: BufReader::new(from), log })
    }

    /// A command without payload whose answer is all in the line.
    fn ask<T: DeserializeOwned>(&mut self, command: Value) -> Result<T> {
        let (answer, _) = self.call(command, &[])?;
        serde_json::from_value(answer).with_context(|| format!("`{}` gave an answer that is not understood", self.name))
    }

    /// One command and its answer.
    fn call(&mut self, mut command: Value, payload: &[u8]) -> Result<(Value, Vec<u8>)> {
        if !payload.is_empty() {
            command["bytes"] = payload.len().into();
        }
        let what = command["cmd"].as_str().unwrap_or_default().to_string();
        match self.exchange(&command, payload) {
            Ok((answer, bytes)) => match answer["error"].as_str() {
                Some(error) => bail!("{TOOL} refuses `{what}`: {error}"),
                None => Ok((answer, bytes)),
            },
            Err(e) => bail!("{}", self.post_mortem(&what, &e)),
        }
    }

    fn exchange(&mut self, command: &Value, payload: &[u8]) -> io::Result<(Value, Vec<u8>)> {
        let to = self.to.as_mut().ok_or(ErrorKind::BrokenPipe)?;
        to.write_all(format!("{command}\n").as_bytes())?;
        to.write_all(payload)?;
        let mut line = vec![];
        if self.from.read_until(b'\n', &mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let answer: Value = serde_json::from_slice(&line)?;
        let mut bytes = vec![0; answer["bytes"].as_u64().unwrap_or(0) as usize];
        self.from.read_exact(&mut bytes)?;
        Ok((answer, bytes))
    }

    /// After a failure of the wire nothing more can be asked: ends the process and words what is known about its end.
    fn post_mortem(&mut self, what: &str, error: &io::Error) -> String {
        self.to = None;
        // A closed pipe is the sign of a process that ends by itself, with an exit status that tells more than a signal of ours.
        if !matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe) {
            let _ = self.child.kill();
        }
        let status = self.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
        let log = self.log.take().and_then(|l| l.join().ok()).unwrap_or_default();
        format!("`{}` ended at `{what}` ({status}; {error}); the end of its log:\n{}", self.name, cmd::tail(&log, 20))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.to = None;
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Side::K => "k",
            Side::V => "v",
        }
    }

    /// Its letter.
    pub fn name(self) -> &'static str {
        match self {
            Side::K => "K",
            Side::V => "V",
        }
    }
}

impl Tensor {
    fn word(self) -> &'static str {
        match self {
            Tensor::Queries => "queries",
            Tensor::Keys => "keys",
            Tensor::Values => "values",
            Tensor::Attention => "attention",
            Tensor::Output => "output",
            Tensor::Joined => "joined",
            Tensor::Errors => "errors",
        }
    }
}

fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Result<Vec<T>> {
    if !bytes.len().is_multiple_of(size_of::<T>()) {
        bail!("{TOOL} sent {} bytes for numbers of {}", bytes.len(), size_of::<T>());
    }
    // The bytes need not be aligned for the numbers.
    let mut res = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut res).copy_from_slice(bytes);
    Ok(res)
}

/// Reads a log to its end, so that its writer never waits, and keeps the last lines.
fn end_of(log: ChildStderr) -> String {
    let mut lines = VecDeque::new();
    for line in BufReader::new(log).split(b'\n').map_while(Result::ok) {
        if lines.len() == 40 {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(&line).into_owned());
    }
    Vec::from(lines).join("\n")
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A folder with a shell script for a probe; it answers `info` and goes on as told.
    fn stand_in(name: &str, then: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("spectral-kv-probe-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let info = json!({"bytes": 0, "description": "d", "hash": u64::MAX, "n_vocab": 1, "n_ctx_train": 1, "layers": [], "bos": null, "rope": {
            "neox": true, "n_rot": 0, "offset": 0, "freq_base": 1.0, "freq_scale": 1.0, "n_ctx_orig": 0, "ext_factor": 0.0,
            "beta_fast": 0.0, "beta_slow": 0.0, "freq_factors": []}});
        let program = dir.join(TOOL);
        std::fs::write(&program, format!("#!/bin/sh\nread line\necho '{info}'\nread line\n{then}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    fn answer(name: &str, then: &str) -> Result<Vec<i32>> {
        let dir = stand_in(name, then);
        let res = Probe::start(&dir, Path::new("m"), 1).unwrap().tokenize("", true);
        std::fs::remove_dir_all(dir).unwrap();
        res
    }

    #[test]
    fn answers_and_refusals_are_told_apart() {
        assert_eq!(answer("answer", r#"printf '{"bytes":8}\n\001\0\0\0\377\377\377\377'"#).unwrap(), [1, -1]);
        let e = answer("refusal", r#"echo '{"error":"too warm"}'"#).unwrap_err().to_string();
        assert!(e.contains("refuses `tokenize`: too warm"), "{e}");
        let e = answer("odd", r#"printf '{"bytes":3}\nabc'"#).unwrap_err().to_string();
        assert!(e.contains("3 bytes"), "{e}");
    }

    #[test]
    fn the_end_of_the_process_is_told_with_its_log() {
        for (name, then, status) in [
            ("exit", "echo why >&2; exit 3", "exit status: 3"),
            ("kill", "echo why >&2; kill -9 $$", "signal: 9"),
            ("short", r#"echo why >&2; printf '{"bytes":9}\nabc'; exit 3"#, "exit status: 3"),
            ("garbage", "echo why >&2; echo garbage; exec sleep 20", "signal: 9"),
        ] {
            let e = answer(name, then).unwrap_err().to_string();
            assert!(e.contains("`tokenize`") && e.contains(status) && e.contains("why") && e.contains(TOOL), "{name}: {e}");
        }
        let e = Probe::start(Path::new("/nowhere"), Path::new("m"), 1).err().unwrap();
        assert!(format!("{e:#}").contains("cannot run `/nowhere/llama-kv-spectral-probe"), "{e:#}");
    }
}
