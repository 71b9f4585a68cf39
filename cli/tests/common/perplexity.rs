//! What llama-perplexity makes of the golden text, stock and patched, and how far apart two results are.
//!
//! Builds both with the `spectral-kv` command (minutes on the first run, seconds after it).

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The folder of the programs that a build makes.
pub fn build(args: &[&str]) -> PathBuf {
    let out = Command::new(env!("CARGO_BIN_EXE_spectral-kv")).arg("build").args(args).arg("--print-bin-dir").stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "spectral-kv build {args:?}:\n{}", String::from_utf8_lossy(&out.stderr));
    PathBuf::from(String::from_utf8(out.stdout).unwrap().trim())
}

pub fn stock() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| build(&["--stock", "--targets", "llama-perplexity,llama-completion"]))
}

pub fn patched() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| build(&[]))
}

/// A file that is not there.
pub fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("llama");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    let _ = std::fs::remove_file(&path);
    path
}

fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("{ROOT}/tests/golden/real.json")).unwrap()).unwrap()
}

/// What the simulated codec makes of the golden text, and in what settings.
pub struct Golden {
    pub bits: String,
    pub chunks: String,
    /// Mean KL divergence to exact rows.
    pub kl: f64,
}

impl Golden {
    /// Of a model in steps of so many tokens.
    pub fn new(model: &str, step: &str) -> Self {
        let (golden, tokens) = (golden(), step.parse::<u64>().unwrap());
        let is_it = |run: &&Value| run["model"] == model && run["step"] == tokens;
        let run = golden["runs"].as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("no run of {model} in steps of {step}"));
        Golden { bits: run["bits"].to_string(), chunks: run["chunks"].to_string(), kl: run["kl"].as_f64().unwrap() }
    }
}

/// Prose from llama.cpp's own documentation: pinned by its checksum, and no test text of our own to maintain.
pub fn text() -> String {
    let sources = stock().join("../../src");
    golden()["text"].as_array().unwrap().iter().map(|f| std::fs::read_to_string(sources.join(f.as_str().unwrap())).unwrap()).collect()
}

/// The file that llama-perplexity writes for `--kl-divergence-base`: "_logits_", context, vocabulary, chunks, tokens; then per judged position scale
/// and minimum in f32 and a u16 per token.
pub struct Logits {
    pub bytes: Vec<u8>,
}

impl Logits {
    /// Of the golden text.
    pub fn new(name: &str, dir: &Path, model: &str, args: &[&str]) -> Self {
        let (input, file) = (scratch(&format!("{name}.txt")), scratch(&format!("{name}.kld")));
        std::fs::write(&input, text()).unwrap();
        let out = Command::new(dir.join("llama-perplexity"))
            .args(["-m", model, "-t", "1", "-tb", "1", "-f", input.to_str().unwrap(), "--kl-divergence-base", file.to_str().unwrap()])
            .args(args)
            .env_remove("LLAMA_KV_SPECTRAL_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        let logits = Logits { bytes: std::fs::read(&file).unwrap() };
        std::fs::remove_file(&file).unwrap();
        assert_eq!(&logits.bytes[..8], b"_logits_");
        let (context, _, chunks) = logits.sizes();
        let positions = chunks * (context - 1 - context / 2);
        assert_eq!(logits.records().len(), positions * logits.record(), "{name}: the file is complete");
        logits
    }

    /// Context, vocabulary, chunks.
    fn sizes(&self) -> (usize, usize, usize) {
        let int = |at: usize| u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize;
        (int(8), int(12), int(16))
    }

    fn record(&self) -> usize {
        2 * (self.sizes().1.div_ceil(2) * 2 + 4)
    }

    fn records(&self) -> &[u8] {
        let (context, _, chunks) = self.sizes();
        &self.bytes[20 + 4 * context * chunks..]
    }

    /// Log-probabilities, one vector per judged position.
    fn positions(&self) -> impl ExactSizeIterator<Item = Vec<f32>> + '_ {
        let vocabulary = self.sizes().1;
        self.records().chunks_exact(self.record()).map(move |r| {
            let float = |at: usize| f32::from_le_bytes(r[at..at + 4].try_into().unwrap());
            let (scale, least) = (float(0), float(4));
            r[8..].chunks_exact(2).take(vocabulary).map(|x| least + scale * f32::from(u16::from_le_bytes([x[0], x[1]]))).collect()
        })
    }
}

/// Mean KL divergence of `q` to `p`, and the share of positions where both prefer the same token.
pub fn compare(p: &Logits, q: &Logits) -> (f64, f64) {
    let (p, q) = (p.positions(), q.positions());
    assert_eq!(p.len(), q.len());
    let best = |x: &[f32]| (0..x.len()).max_by(|a, b| x[*a].total_cmp(&x[*b])).unwrap();
    let (n, mut kl, mut same) = (p.len() as f64, 0.0, 0);
    for (p, q) in p.zip(q) {
        kl += p.iter().zip(&q).map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum::<f64>();
        same += usize::from(best(&p) == best(&q));
    }
    (kl / n, same as f64 / n)
}
