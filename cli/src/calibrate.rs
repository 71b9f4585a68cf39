//! `calibrate`: runs texts through an f16 cache, has the library analyse the rows of each layer, and writes what it finds.
//!
//! Owns the choice of texts and of the queries that are kept. Must not know what is found, nor what the file looks like.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{bail, ensure, Context as _, Result};
use half::f16;
use spectral_kv::codec::calibration::{CalibratedLayer, Calibration, LayerModel, Text};
use spectral_kv::config::{LayerShape, Scoring};
use spectral_kv::layout::QUERY_SLOTS;
use spectral_kv::rope::RopeParams;

use super::build::{self, Request, Tree};
use super::fetch::SourceKind;
use super::probe::{self, BranchStep, Cache, Context, ContextSpec, Keep, LayerInfo, Probe, Tensor, Want};
use super::rope;

/// Tokens that go through the graph at once.
const STEP: usize = 512;

/// What to calibrate, and on what.
pub struct Calibrate {
    /// The model.
    pub model: PathBuf,
    /// Where the texts come from.
    pub files: Vec<PathBuf>,
    /// How many texts.
    pub texts: usize,
    /// Tokens of a text.
    pub length: usize,
    /// Context size to weigh distances for; the model's if not given.
    pub ctx: Option<u32>,
    /// Where the result goes.
    pub output: PathBuf,
    /// Threads of llama.cpp.
    pub threads: usize,
    /// Where llama.cpp comes from.
    pub source: SourceKind,
    /// How many compilers at once.
    pub jobs: Option<u32>,
}

/// Builds, runs, analyses and writes.
pub fn run(c: &Calibrate) -> Result<ExitCode> {
    if !c.model.is_file() {
        bail!("there is no model {}", c.model.display());
    }
    let files: Vec<String> = c.files.iter().map(read).collect::<Result<_>>()?;
    let request = Request { tree: Tree::Patched, targets: vec![probe::TOOL], source: c.source, jobs: c.jobs };
    let mut probe = Probe::start(&build::ensure(&request)?, &c.model, c.threads)?;
    let info = probe.info().clone();
    let tokens = choose(&mut probe, &files, c)?;

    let cache = Cache::Stock { k: "f16".into(), v: "f16".into(), rotate: false };
    let context = probe.open(&ContextSpec { n_ctx: c.length as u32, n_ubatch: STEP as u32, cache, keep: Keep::Tensors })?;
    let mut layers: Vec<Vec<Text>> = info.layers.iter().map(|_| vec![]).collect();
    for (i, text) in tokens.iter().enumerate() {
        eprintln!("text {} of {}: {} tokens", i + 1, tokens.len(), text.len());
        probe.clear(&context)?;
        for (layer, text) in layers.iter_mut().zip(collect(&mut probe, &context, &info.layers, text)?) {
            layer.push(text);
        }
    }
    for (il, layer) in layers.iter_mut().enumerate().filter(|(il, _)| info.layers[*il].n_head_kv > 0) {
        match joined_scale(&mut probe, &context, il) {
            Ok(scale) => layer.iter_mut().flat_map(|text| &mut text.residual).for_each(|x| *x /= scale.powi(2)),
            Err(e) => {
                eprintln!("layer {}: errors are held against what its attention gives, not against the residual stream: {e:#}", il + 1);
                layer.iter_mut().for_each(|text| text.residual.clear());
            }
        }
    }
    let mut calibration = Calibration { model_hash: info.hash, layers: vec![] };
    for (il, (layer, texts)) in info.layers.iter().zip(layers).enumerate() {
        if layer.n_head_kv == 0 {
            calibration.layers.push(None);
            continue;
        }
        eprintln!("layer {} of {}", il + 1, info.layers.len());
        let projection = probe.captured(&context, il, Tensor::Output).unwrap_or_else(|e| {
            eprintln!("values of this layer are weighted evenly: {e:#}");
            vec![]
        });
        let model = LayerModel {
            shape: LayerShape { n_head: layer.n_head as u32, n_head_kv: layer.n_head_kv as u32, d_k: layer.d_k as u32, d_v: layer.d_v as u32 },
            rope: &layer.rope.as_ref().map_or_else(RopeParams::none, rope::params),
            scoring: Scoring { scale: layer.scale, softcap: layer.softcap },
            projection: &projection,
            distance: c.ctx.unwrap_or(info.n_ctx_train as u32),
        };
        calibration.layers.push(Some(CalibratedLayer::new(&model, &texts).with_context(|| format!("layer {il}"))?));
    }
    let bytes = calibration.to_bytes();
    fs::write(&c.output, &bytes).with_context(|| format!("cannot write {}", c.output.display()))?;
    eprintln!("{}: {:.1} MiB for {}", c.output.display(), bytes.len() as f64 / 1024.0 / 1024.0, info.description);
    Ok(ExitCode::SUCCESS)
}

fn read(file: &PathBuf) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("cannot read the text {}", file.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// As many texts as asked for, taken from the files in turn and spread evenly over each.
fn choose(probe: &mut Probe, files: &[String], c: &Calibrate) -> Result<Vec<Vec<i32>>> {
    let bos = probe.info().bos;
    let mut texts = vec![];
    for (i, text) in files.iter().enumerate() {
        let n = (c.texts + files.len() - 1 - i) / files.len();
        for part in 0..n {
            // Twice the bytes that tokens usually have; the rest is not looked at.
            let (first, end) = (text.len() * part / n, text.len() * (part + 1) / n);
            let end = end.min(first + 16 * c.length);
            let piece = String::from_utf8_lossy(&text.as_bytes()[first..end]).into_owned();
            let mut tokens: Vec<i32> = bos.into_iter().chain(probe.tokenize(&piece, false)?).collect();
            if tokens.len() < c.length {
                bail!("{} has no {n} texts of {} tokens: name more or longer files, or lower --texts or --length", c.files[i].display(), c.length);
            }
            tokens.truncate(c.length);
            texts.push(tokens);
        }
    }
    Ok(texts)
}

/// How much larger the output of the projection is in the residual stream; an error where there is more than a factor in between.
fn joined_scale(probe: &mut Probe, context: &Context, layer: usize) -> Result<f32> {
    let mut scale = 1.0;
    for step in probe.branch(context, layer)?.0 {
        match step {
            BranchStep::Add { .. } => {}
            BranchStep::Scale { by, .. } => scale *= by,
            step => bail!("{step:?} lies between"),
        }
    }
    ensure!(scale != 0.0, "it is not added there");
    Ok(scale)
}

/// Runs one text; returns its rows in each layer, empty ones for layers without attention.
fn collect(probe: &mut Probe, context: &Context, layers: &[LayerInfo], tokens: &[i32]) -> Result<Vec<Text>> {
    let mut texts: Vec<Text> = layers.iter().map(|_| Text { k: vec![], v: vec![], q_positions: vec![], q: vec![], residual: vec![] }).collect();
    let stride = tokens.len().div_ceil(QUERY_SLOTS);
    for (step, piece) in tokens.chunks(STEP).enumerate() {
        let kept: Vec<usize> = (0..piece.len()).filter(|i| (step * STEP + i).is_multiple_of(stride)).collect();
        probe.decode(context, piece, Want::None, &kept)?;
        for (il, (layer, text)) in layers.iter().zip(&mut texts).enumerate().filter(|(_, (l, _))| l.n_head_kv > 0) {
            text.k.extend(to_f16(&probe.captured(context, il, Tensor::Keys)?));
            text.v.extend(to_f16(&probe.captured(context, il, Tensor::Values)?));
            let queries = probe.captured(context, il, Tensor::Queries)?;
            let n = layer.n_head * layer.d_k;
            for i in &kept {
                text.q_positions.push((step * STEP + i) as i32);
                text.q.extend(to_f16(&queries[i * n..(i + 1) * n]));
            }
            let joined = probe.captured(context, il, Tensor::Joined).unwrap_or_default();
            text.residual.extend(joined.chunks_exact((joined.len() / kept.len().max(1)).max(1)).map(|x| x.iter().map(|x| x * x).sum::<f32>()));
        }
    }
    Ok(texts)
}

fn to_f16(x: &[f32]) -> impl Iterator<Item = f16> + '_ {
    x.iter().map(|x| f16::from_f32(*x))
}
