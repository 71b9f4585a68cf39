//! The remote control of the patched llama.cpp, through its client, and the `diff` command that is made with it.
//!
//! Builds llama.cpp with the `spectral-kv` command (minutes on the first run, seconds after it).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::{json, Value};

#[path = "../src"]
mod tool {
    #[expect(dead_code, reason = "only the wording of failures is used")]
    pub mod cmd;
    #[path = "bench/gguf.rs"]
    pub mod gguf;
    pub mod law;
    #[expect(dead_code, reason = "names for tables")]
    pub mod probe;
}

use tool::gguf::{self, Kind, Value as Metadata};
use tool::law::{by_layer, Token};
use tool::probe::{BranchStep, Cache, Context, ContextSpec, Keep, Probe, Side, Tensor, Want, TOOL};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn bin() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let out = spectral_kv(&["build", "--targets", TOOL, "--print-bin-dir"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        PathBuf::from(String::from_utf8(out.stdout).unwrap().trim())
    })
}

fn spectral_kv(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_spectral-kv")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn model() -> String {
    format!("{ROOT}/tests/models/bench-a-f16.gguf")
}

fn start() -> Probe {
    Probe::start(bin(), Path::new(&model()), 1).unwrap()
}

fn prompt(probe: &mut Probe, n: usize) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("{ROOT}/tests/data/prompt.txt")).unwrap();
    let mut tokens = probe.tokenize(&text, true).unwrap();
    tokens.truncate(n);
    tokens
}

fn stock(kind: &str, rotate: bool) -> Cache {
    Cache::Stock { k: kind.into(), v: kind.into(), rotate }
}

fn spectral(window: u32) -> Cache {
    Cache::Spectral { ratio: 8.0, bits: 0.0, window, fine: None, basis: None }
}

fn spec(cache: Cache, n_ubatch: u32) -> ContextSpec {
    ContextSpec { n_ctx: 2048, n_ubatch, cache, keep: Keep::Nothing }
}

fn largest(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

fn relative(exact: &[f32], got: &[f32]) -> f64 {
    assert_eq!(exact.len(), got.len());
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut exact.iter().zip(got).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
}

#[test]
fn the_model_is_described() {
    let mut probe = start();
    let info = probe.info().clone();
    assert_eq!((info.n_vocab, info.n_ctx_train, info.bos, info.layers.len()), (4096, 4096, Some(0), 3));
    assert!(info.description.contains("F16") && info.layers.iter().all(|l| (l.n_head, l.n_head_kv, l.d_k, l.d_v) == (4, 2, 128, 128)));

    for l in &info.layers {
        assert!((l.scale - 128f32.powf(-0.5)).abs() < 1e-6 && l.softcap == 0.0 && l.rope.as_ref().is_some_and(|r| r.n_rot == 128));
    }

    let text = "Zum Beispiel: naïve café, 1 < 2.\n";
    let tokens = probe.tokenize(text, false).unwrap();
    assert_eq!(probe.detokenize(&tokens).unwrap(), text);
    assert_eq!(probe.tokenize(text, true).unwrap(), [vec![0], tokens].concat());
    assert_eq!(probe.detokenize(&[]).unwrap(), "");
}

#[test]
fn keys_are_rotated_as_described() {
    let mut probe = start();
    let rope = probe.info().rope.clone();
    let context = probe.open(&ContextSpec { keep: Keep::Tensors, ..spec(stock("f16", true), 64) }).unwrap();
    probe.decode(&context, &[200; 64], Want::None, &[]).unwrap();
    let keys = probe.captured(&context, 0, Tensor::Keys).unwrap();
    let (d, row) = (128, 256);
    assert_eq!((rope.n_rot, rope.offset, rope.freq_factors.len()), (d, 0, 0));
    assert_eq!((rope.n_ctx_orig, rope.ext_factor, rope.beta_fast, rope.beta_slow), (4096, 0.0, 32.0, 1.0));
    // In the first layer all keys of a token are the same but for the rotation.
    for p in 0..64 {
        let mut back = keys[p * row..(p + 1) * row].to_vec();
        for pair in 0..row / 2 {
            let (head, i) = (pair / (d / 2) * d, pair % (d / 2));
            let (a, b) = if rope.neox { (head + i, head + i + d / 2) } else { (head + 2 * i, head + 2 * i + 1) };
            let angle = p as f32 * rope.freq_scale * rope.freq_base.powf(-(2.0 * i as f32) / d as f32);
            let (x, y) = (back[a], back[b]);
            back[a] = x * angle.cos() + y * angle.sin();
            back[b] = y * angle.cos() - x * angle.sin();
        }
        assert!(largest(&back, &keys[..row]) < 1e-3, "position {p}");
    }
}

#[test]
fn contexts_do_not_know_each_other() {
    let mut probe = start();
    let tokens = prompt(&mut probe, 700);
    let alone = |probe: &mut Probe, cache| {
        let context = probe.open(&spec(cache, 512)).unwrap();
        let logits = probe.decode(&context, &tokens, Want::Last, &[]).unwrap();
        let next = probe.decode(&context, &tokens[..3], Want::All, &[]).unwrap();
        probe.close(&context).unwrap();
        [logits, next].concat()
    };
    let caches = [stock("f16", true), spectral(128), stock("q4_0", true), stock("q4_0", false)];
    let want: Vec<_> = caches.iter().map(|c| alone(&mut probe, c.clone())).collect();
    assert_eq!(want[0].len(), 4 * 4096);
    assert!(largest(&want[2], &want[3]) > 0.0, "the rotation changes what q4_0 loses");

    let open: Vec<_> = caches.iter().map(|c| probe.open(&spec(c.clone(), 512)).unwrap()).collect();
    let first: Vec<_> = open.iter().map(|c| probe.decode(c, &tokens, Want::Last, &[]).unwrap()).collect();
    for (i, context) in open.iter().enumerate() {
        let next = probe.decode(context, &tokens[..3], Want::All, &[]).unwrap();
        assert!([first[i].clone(), next].concat() == want[i], "context {i}");
    }
    // A cleared context is a new one.
    for (i, context) in open.iter().enumerate() {
        probe.clear(context).unwrap();
        assert!(probe.decode(context, &tokens, Want::Last, &[]).unwrap() == first[i], "context {i}");
    }
}

#[test]
fn bytes_are_those_of_the_cache() {
    let mut probe = start();
    let mut held = |cache| {
        let c = probe.open(&ContextSpec { n_ctx: 4096, ..spec(cache, 512) }).unwrap();
        (c.bytes_held, c.ratio, c.code_bits)
    };
    assert_eq!(held(stock("f16", true)), (12 << 20, 1.0, None));
    let (bytes, ratio, bits) = held(stock("q8_0", true));
    assert!(bytes == 51 << 17 && (ratio - 32.0 / 17.0).abs() < 1e-9 && bits.is_none(), "{bytes} {ratio} {bits:?}");
    let (bytes, ratio, bits) = held(Cache::Spectral { ratio: 4.0, bits: 0.0, window: 128, fine: None, basis: None });
    assert!((ratio - (12 << 20) as f64 / bytes as f64).abs() < 1e-9 && ratio > 2.0 && ratio < 4.1, "{ratio}");
    assert!(bits.is_some_and(|b| b > 2.0 && b < 4.0), "{bits:?}");
    assert_eq!(held(Cache::Spectral { ratio: 8.0, bits: 2.0, window: 128, fine: None, basis: None }).2, Some(2.0));
}

#[test]
fn rows_can_be_read_and_replaced() {
    let mut probe = start();
    let tokens = prompt(&mut probe, 300);
    let context = probe.open(&spec(stock("f16", true), 128)).unwrap();
    probe.decode(&context, &tokens[..299], Want::None, &[]).unwrap();
    let last = |probe: &mut Probe| {
        let logits = probe.decode(&context, &tokens[299..], Want::Last, &[]).unwrap();
        probe.truncate(&context, 299).unwrap();
        logits
    };
    let want = last(&mut probe);
    assert!(last(&mut probe) == want, "going back and forth changes nothing");

    for layer in 0..3 {
        for side in [Side::K, Side::V] {
            let rows = probe.rows(&context, layer, side, 0, 299).unwrap();
            assert_eq!(rows.len(), 299 * 256);
            probe.set_rows(&context, layer, side, 0, &rows).unwrap();
            assert_eq!(probe.rows(&context, layer, side, 100, 2).unwrap(), rows[100 * 256..102 * 256]);
        }
    }
    assert!(last(&mut probe) == want, "the same rows give the same logits");

    for side in [Side::K, Side::V] {
        let row = probe.rows(&context, 1, side, 298, 1).unwrap();
        probe.set_rows(&context, 1, side, 298, &row.iter().map(|x| -x).collect::<Vec<_>>()).unwrap();
        assert!(largest(&last(&mut probe), &want) > 1e-3, "another row gives other logits");
        probe.set_rows(&context, 1, side, 298, &row).unwrap();
    }
    assert!(last(&mut probe) == want);
}

#[test]
fn captured_tensors_are_those_of_the_attention() {
    let mut probe = start();
    let tokens = prompt(&mut probe, 201);
    let mut reference = vec![];
    for (cache, n_ubatch, tolerance) in [
        (stock("f16", true), 64, 0.0),
        (spectral(2048), 64, 0.01),
        (spectral(2048), 128, 0.01),
        (stock("q8_0", true), 64, 0.03),
        (stock("q8_0", false), 64, 0.03),
    ] {
        let context = probe.open(&ContextSpec { keep: Keep::Tensors, ..spec(cache.clone(), n_ubatch) }).unwrap();
        probe.decode(&context, &tokens[..200], Want::None, &[]).unwrap();
        let long: Vec<_> = (0..3).map(|l| capture(&mut probe, &context, l)).collect();
        probe.decode(&context, &tokens[200..], Want::None, &[]).unwrap();
        let short: Vec<_> = (0..3).map(|l| capture(&mut probe, &context, l)).collect();
        for (layer, (long, short)) in long.iter().zip(&short).enumerate() {
            assert_eq!(long.each_ref().map(Vec::len), [512, 256, 256, 512].map(|n| 200 * n));
            assert_eq!(short.each_ref().map(Vec::len), [512, 256, 256, 512]);
            let [q, _, _, attention] = short;
            if reference.len() < 3 {
                let sides = [(Side::K, 1), (Side::V, 2)].map(|(side, i)| {
                    let rows = probe.rows(&context, layer, side, 0, 201).unwrap();
                    assert!(relative(&rows, &[&long[i][..], &short[i]].concat()) < 1e-3, "the rows are the captured ones, in f16");
                    rows
                });
                assert!(relative(&attend(q, &sides[0], &sides[1]), attention) < 0.005, "layer {layer}");
                reference.push([long[3].clone(), attention.clone()]);
            } else {
                for (exact, got) in reference[layer].iter().zip([&long[3], attention]) {
                    let e = relative(exact, got);
                    assert!(e <= tolerance, "{cache:?}, -ub {n_ubatch}, layer {layer}: {e}");
                }
            }
        }
    }
}

/// Attention outputs and errors of three of the last tokens of a text, in the first layer, where all caches get the same rows.
fn judged(probe: &mut Probe, cache: Cache, n_ubatch: u32, keep: Keep) -> [Vec<f32>; 2] {
    let tokens = prompt(probe, 1500);
    let context = probe.open(&ContextSpec { keep, ..spec(cache, n_ubatch) }).unwrap();
    probe.decode(&context, &tokens[..1280], Want::None, &[]).unwrap();
    let logits = probe.decode(&context, &tokens[1280..], Want::Last, &[0, 90, 219]).unwrap();
    assert_eq!(logits.len(), 4096);
    let attention = probe.captured(&context, 0, Tensor::Attention).unwrap();
    let attention = [0, 90, 219].map(|t| attention[t * 512..][..512].to_vec()).concat();
    let errors = if keep == Keep::ExactRows { probe.captured(&context, 0, Tensor::Errors).unwrap() } else { vec![] };
    probe.close(&context).unwrap();
    [attention, errors]
}

#[test]
fn errors_are_what_the_codes_change() {
    let mut probe = start();
    let [exact, _] = judged(&mut probe, stock("f16", true), 64, Keep::Tensors);
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() / f64::from(norm_of(&exact));
    let mixed = |k: &str, v: &str, rotate| Cache::Stock { k: k.into(), v: v.into(), rotate };
    // Whole errors and the part of the values, over the exact output: at least, and at most.
    let none = (0.0, 0.004);
    for (cache, n_ubatch, whole_range, values_range) in [
        (stock("f16", true), 64, none, none),
        (stock("q4_0", true), 64, (0.02, 0.3), (0.01, 0.3)),
        (mixed("f16", "q4_0", true), 64, (0.02, 0.3), (0.02, 0.3)),
        (mixed("f16", "q4_0", false), 128, (0.02, 0.3), (0.02, 0.3)),
        (mixed("q4_0", "f16", true), 64, (0.005, 0.3), none),
        (spectral(2048), 64, none, none),
        (spectral(2048), 100, none, none),
        (spectral(2048), 1, none, none),
        (spectral(128), 64, (0.005, 0.3), (0.002, 0.2)),
        (spectral(128), 100, (0.005, 0.3), (0.002, 0.2)),
    ] {
        let [got, errors] = judged(&mut probe, cache.clone(), n_ubatch, Keep::ExactRows);
        let halves = |i: usize| errors.chunks(512).skip(i).step_by(2).flatten().copied().collect::<Vec<_>>();
        let (whole, values) = (halves(0), halves(1));
        let difference: Vec<f32> = got.iter().zip(&exact).map(|(g, e)| g - e).collect();
        let missed: Vec<f32> = whole.iter().zip(&difference).map(|(w, d)| w - d).collect();
        println!("{cache:?}, -ub {n_ubatch}: whole {:.5}, values {:.5}, missed {:.5}", norm(&whole), norm(&values), norm(&missed));
        assert!(norm(&missed) < 0.004, "{cache:?}, -ub {n_ubatch}");
        for (x, range) in [(&whole, whole_range), (&values, values_range)] {
            assert!((range.0..range.1).contains(&norm(x)), "{cache:?}, -ub {n_ubatch}: {}", norm(x));
        }
        if matches!(&cache, Cache::Stock { k, .. } if k == "f16") {
            assert!(relative(&whole, &values) < 1e-3 || whole_range == none, "all of it comes from the values");
        }
    }
}

fn norm_of(x: &[f32]) -> f32 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32
}

#[test]
fn the_residual_stream_is_found_behind_a_norm_or_without_one() {
    let olmo = scratch("olmo2.gguf");
    std::fs::write(&olmo, random_olmo2()).unwrap();
    for (path, n_steps) in [(Path::new(&model()), 0), (&olmo, 2)] {
        let mut probe = Probe::start(bin(), path, 1).unwrap();
        let context = probe.open(&ContextSpec { keep: Keep::Tensors, ..spec(stock("f16", true), 64) }).unwrap();
        let mut tokens: Vec<i32> = (0..100).map(|i| i * 7 % 60).collect();
        (tokens[3], tokens[70], tokens[99]) = (5, 5, 5);
        probe.decode(&context, &tokens, Want::None, &[3, 70, 99]).unwrap();
        let (steps, numbers) = probe.branch(&context, 0).unwrap();
        assert_eq!(steps.len(), n_steps, "{steps:?}");
        let all = |probe: &mut Probe, layer, tensor| probe.captured(&context, layer, tensor).unwrap();
        let (joined, last) = (all(&mut probe, 0, Tensor::Joined), all(&mut probe, 1, Tensor::Joined));
        let (attention, projection) = (all(&mut probe, 0, Tensor::Attention), all(&mut probe, 0, Tensor::Output));
        let (width, outputs) = (attention.len() / 100, joined.len() / 3);
        // What the sum was made of is the embedding, the same for the same token.
        let streams = [3, 70, 99].into_iter().zip(joined.chunks(outputs)).map(|(t, joined)| {
            let of_row = |row: &[f32]| row.iter().zip(&attention[t * width..]).map(|(a, b)| a * b).sum::<f32>();
            let mut y: Vec<f32> = projection.chunks(width).map(of_row).collect();
            if let [BranchStep::RmsNorm { eps }, BranchStep::Mul { n }] = steps[..] {
                assert_eq!(n, outputs);
                let root = (norm_of(&y).powi(2) / n as f32 + eps).sqrt();
                y.iter_mut().zip(&numbers).for_each(|(y, g)| *y *= g / root);
            }
            joined.iter().zip(y).map(|(j, y)| j - y).collect::<Vec<_>>()
        });
        let streams: Vec<Vec<f32>> = streams.collect();
        assert!(streams[1..].iter().all(|s| largest(s, &streams[0]) < 0.02 * norm_of(&joined[..outputs])), "{}", path.display());
        assert!(relative(&joined[..outputs], &joined[outputs..2 * outputs]) > 0.02, "the sums differ");
        // The last layer goes on with fewer tokens.
        probe.clear(&context).unwrap();
        probe.decode(&context, &tokens, Want::All, &[70]).unwrap();
        assert_eq!(all(&mut probe, 1, Tensor::Joined), last[outputs..2 * outputs]);
    }
    std::fs::remove_file(olmo).unwrap();
}

#[test]
fn terms_fall_with_the_bits() {
    let mut probe = start();
    let tokens = prompt(&mut probe, 1500);
    let f16 = probe.open(&ContextSpec { keep: Keep::Tensors, ..spec(stock("f16", true), 64) }).unwrap();
    let feed = |probe: &mut Probe, context: &Context| {
        probe.decode(context, &tokens[..1440], Want::None, &[]).unwrap();
        probe.decode(context, &tokens[1440..], Want::None, &[59]).unwrap();
    };
    feed(&mut probe, &f16);
    let mut whole = vec![];
    for kind in ["q4_0", "q8_0"] {
        let coded = probe.open(&ContextSpec { keep: Keep::ExactRows, ..spec(stock(kind, true), 64) }).unwrap();
        feed(&mut probe, &coded);
        let seen: Vec<[Vec<f32>; 3]> = (0..3)
            .map(|l| {
                let attention = probe.captured(&f16, l, Tensor::Attention).unwrap();
                let attention = attention[attention.len() - 512..].to_vec();
                [attention, probe.captured(&f16, l, Tensor::Joined).unwrap(), probe.captured(&coded, l, Tensor::Errors).unwrap()]
            })
            .collect();
        let tokens: Vec<Token> =
            seen.iter().enumerate().map(|(layer, [attention, joined, errors])| Token { layer, attention, joined, errors }).collect();
        let terms = by_layer(&mut probe, &f16, &tokens).unwrap();
        assert!(terms.iter().all(|t| t.keys.len() == 2 && t.values.len() == 2 && t.whole > 0.0), "{terms:?}");
        whole.push(terms.iter().map(|t| t.whole).sum::<f64>());
    }
    // 4 bits more: 256 times less.
    assert!(whole[0] < 0.1 && whole[0] / whole[1] > 50.0, "{whole:?}");
}

/// Two layers of random weights, with a norm behind the attention.
fn random_olmo2() -> Vec<u8> {
    let n = Metadata::U32;
    let metadata = [
        ("general.architecture", Metadata::Text("olmo2")),
        ("olmo2.context_length", n(2048)),
        ("olmo2.embedding_length", n(64)),
        ("olmo2.block_count", n(2)),
        ("olmo2.feed_forward_length", n(96)),
        ("olmo2.attention.head_count", n(2)),
        ("olmo2.attention.head_count_kv", n(1)),
        ("olmo2.attention.layer_norm_rms_epsilon", Metadata::F32(1e-5)),
        ("olmo2.rope.freq_base", Metadata::F32(10000.0)),
        ("olmo2.vocab_size", n(64)),
        ("tokenizer.ggml.model", Metadata::Text("no_vocab")),
    ];
    let tensor = |name: String, columns, rows| gguf::Tensor { name, columns, rows, kind: Kind::F32 };
    let mut tensors = vec![("token_embd", 64, 64), ("output", 64, 64), ("output_norm", 64, 1)];
    let layer = [
        ("attn_q", 64, 64),
        ("attn_k", 64, 32),
        ("attn_v", 64, 32),
        ("attn_output", 64, 64),
        ("attn_q_norm", 64, 1),
        ("attn_k_norm", 32, 1),
        ("post_attention_norm", 64, 1),
        ("ffn_gate", 64, 96),
        ("ffn_up", 64, 96),
        ("ffn_down", 96, 64),
        ("post_ffw_norm", 64, 1),
    ];
    let mut all: Vec<_> = tensors.drain(..).map(|(name, columns, rows)| tensor(format!("{name}.weight"), columns, rows)).collect();
    for i in 0..2 {
        all.extend(layer.map(|(name, columns, rows)| tensor(format!("blk.{i}.{name}.weight"), columns, rows)));
    }
    let (mut out, mut state) = (vec![], 1u32);
    let fill = |_: &gguf::Tensor, row: &mut [f32]| {
        row.iter_mut().for_each(|x| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            *x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        });
    };
    gguf::write(&mut out, &metadata, &all, fill).unwrap();
    out
}

fn capture(probe: &mut Probe, context: &Context, layer: usize) -> [Vec<f32>; 4] {
    [Tensor::Queries, Tensor::Keys, Tensor::Values, Tensor::Attention].map(|t| probe.captured(context, layer, t).unwrap())
}

/// Attention of one token, 4 query heads over 2 KV heads of 128.
fn attend(q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let d = 128;
    let head = |h: usize| {
        let part = |x: &[f32], t: usize| x[t * 2 * d + h / 2 * d..][..d].to_vec();
        let score = |t| q[h * d..][..d].iter().zip(part(k, t)).map(|(a, b)| f64::from(a * b)).sum::<f64>() / (d as f64).sqrt();
        let weights: Vec<f64> = (0..k.len() / (2 * d)).map(|t| score(t).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let element = |i: usize| weights.iter().enumerate().map(|(t, w)| w / sum * f64::from(part(v, t)[i])).sum::<f64>() as f32;
        (0..d).map(element).collect::<Vec<_>>()
    };
    (0..4).flat_map(head).collect()
}

#[test]
fn a_window_as_long_as_the_context_is_f16() {
    let mut probe = start();
    let tokens = prompt(&mut probe, 1500);
    let mut run = |cache| {
        let context = probe.open(&spec(cache, 512)).unwrap();
        probe.decode(&context, &tokens[..1450], Want::None, &[]).unwrap();
        tokens[1450..].iter().flat_map(|t| probe.decode(&context, &[*t], Want::Last, &[]).unwrap()).collect::<Vec<_>>()
    };
    let (f16, exact, coded) = (run(stock("f16", true)), run(spectral(2048)), run(spectral(128)));
    let (near, far) = (relative(&f16, &exact), relative(&f16, &coded));
    assert!(near < 0.003 && far > 2.0 * near && far < 0.1, "{near} {far}");
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    let mut probe = start();
    let f16 = probe.open(&spec(stock("f16", true), 512)).unwrap();
    let coded = probe.open(&spec(spectral(128), 512)).unwrap();
    let closed = probe.open(&spec(stock("q8_0", true), 512)).unwrap();
    probe.close(&closed).unwrap();
    probe.decode(&f16, &[1, 2, 3], Want::None, &[]).unwrap();
    probe.decode(&coded, &[1, 2, 3], Want::None, &[]).unwrap();

    let refusals = [
        (probe.decode(&f16, &[4096], Want::Last, &[]).map(drop), "token 4096"),
        (probe.decode(&f16, &[-1], Want::Last, &[]).map(drop), "token -1"),
        (probe.decode(&f16, &[], Want::Last, &[]).map(drop), "0 tokens"),
        (probe.decode(&f16, &[1; 2046], Want::Last, &[]).map(drop), "2046 tokens at position 3 of 2048"),
        (probe.decode(&closed, &[1], Want::Last, &[]).map(drop), "no context"),
        (probe.truncate(&f16, 4), "only 3 positions"),
        (probe.rows(&f16, 0, Side::K, 2, 2).map(drop), "only 3 positions"),
        (probe.rows(&f16, 3, Side::K, 0, 1).map(drop), "f16"),
        (probe.rows(&coded, 0, Side::K, 0, 1).map(drop), "stock f16 cache"),
        (probe.set_rows(&coded, 0, Side::V, 0, &[0.0; 256]), "stock f16 cache"),
        (probe.set_rows(&f16, 0, Side::V, 0, &[0.0; 255]), "256 elements"),
        (probe.captured(&f16, 0, Tensor::Keys).map(drop), "without capture"),
        (probe.captured(&coded, 0, Tensor::Output).map(drop), "stock cache"),
        (probe.branch(&coded, 0).map(drop), "stock cache"),
        (probe.captured(&f16, 0, Tensor::Errors).map(drop), "no exact rows"),
        (probe.decode(&f16, &[1], Want::None, &[0]).map(drop), "without capture"),
        (probe.decode(&f16, &[1, 2], Want::None, &[1, 1]).map(drop), "ascending numbers below 2"),
        (probe.decode(&f16, &[1, 2], Want::None, &[2]).map(drop), "ascending numbers below 2"),
        (probe.open(&spec(stock("q3_k", true), 512)).map(drop), "k must be one of f32, f16"),
        (probe.open(&spec(Cache::Spectral { ratio: 65.0, bits: 0.0, window: 1, fine: None, basis: None }, 512)).map(drop), "1 to 64"),
        (probe.open(&spec(Cache::Spectral { ratio: 0.0, bits: 0.0, window: 1, fine: None, basis: None }, 512)).map(drop), "1 to 64"),
        (probe.open(&ContextSpec { n_ctx: 0, ..spec(spectral(1), 512) }).map(drop), "n_ctx"),
    ];
    for (res, reason) in refusals {
        let e = format!("{:#}", res.expect_err(reason));
        assert!(e.contains(reason), "{reason}: {e}");
    }
    let output = probe.captured(&f16, 0, Tensor::Output).unwrap();
    assert!(output.len().is_multiple_of(512) && output.chunks(512).all(|row| row.iter().any(|x| *x != 0.0)), "{} numbers", output.len());
    assert_eq!(probe.decode(&f16, &[4], Want::All, &[]).unwrap().len(), 4096, "it goes on");
    let e = Probe::start(bin(), Path::new("/nowhere.gguf"), 1).err().unwrap().to_string();
    assert!(e.contains("exit status: 1") && e.contains("/nowhere.gguf"), "{e}");
}

#[test]
fn malformed_commands_are_answered() {
    let mut child =
        Command::new(bin().join(TOOL)).args(["-m", &model()]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let bad: [&[u8]; 12] = [
        b"nonsense\n",
        b"\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b"{}\n",
        b"{\"cmd\":7}\n",
        b"{\"cmd\":\"fly\",\"bytes\":3}\nabc",
        b"{\"cmd\":\"info\",\"bytes\":-3}\n",
        b"{\"cmd\":\"open\",\"n_ctx\":512,\"n_ubatch\":-1,\"capture\":false,\"cache\":{\"ratio\":8,\"bits\":0,\"window\":1}}\n",
        b"{\"cmd\":\"open\",\"n_ctx\":512,\"n_ubatch\":9,\"capture\":false,\"cache\":{\"ratio\":\"8\",\"bits\":0,\"window\":1}}\n",
        b"{\"cmd\":\"decode\",\"id\":0,\"want\":\"last\",\"bytes\":3}\nabc",
        b"{\"cmd\":\"detokenize\",\"bytes\":3}\nabc",
    ];
    let mut to = child.stdin.take().unwrap();
    to.write_all(&bad.concat()).unwrap();
    to.write_all(b"{\"cmd\":\"tokenize\",\"add_special\":false,\"bytes\":0}\n").unwrap();
    drop(to);
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", out.status);
    let answers: Vec<Value> = String::from_utf8(out.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers.len(), bad.len() + 1);
    for (answer, command) in answers.iter().zip(bad) {
        assert!(answer["error"].is_string(), "{}: {answer}", String::from_utf8_lossy(command));
    }
    assert_eq!(answers[bad.len()], json!({"bytes": 0}));
}

/// A calibration of the model on its test prompt, made once.
fn basis() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        bin();
        let path = scratch("basis.skv");
        let prompt = format!("{ROOT}/tests/data/prompt.txt");
        let args = ["calibrate", "-m", &model(), "-f", &prompt, "--texts", "2", "--length", "900", "-t", "1", "-o", path.to_str().unwrap()];
        let out = spectral_kv(&args);
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && log.contains("text 2 of 2") && log.contains("layer 3 of 3") && !log.contains("evenly"), "{log}");
        path
    })
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe");
    std::fs::create_dir_all(&dir).unwrap();
    dir.join(name)
}

fn calibrated(bits: f32, basis: &Path) -> Cache {
    Cache::Spectral { ratio: 8.0, bits, window: 128, fine: None, basis: Some(basis.into()) }
}

#[test]
fn a_calibrated_cache_codes_from_the_start_and_stays_near() {
    let mut probe = start();
    let text = std::fs::read_to_string(format!("{ROOT}/README.md")).unwrap();
    let tokens: Vec<i32> = probe.tokenize(&text, true).unwrap()[..800].to_vec();
    let mut run = |cache| {
        let context = probe.open(&spec(cache, 64)).unwrap();
        let logits = probe.decode(&context, &tokens, Want::All, &[]).unwrap();
        probe.close(&context).unwrap();
        logits.chunks(4096).map(log_softmax).collect::<Vec<_>>()
    };
    let exact = run(stock("f16", true));
    let fitted = run(Cache::Spectral { ratio: 8.0, bits: 2.0, window: 128, fine: None, basis: None });
    let coded = run(calibrated(2.0, basis()));
    let kl = |of: &[Vec<f64>]| {
        let one = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        exact.iter().zip(of).map(one).sum::<f64>() / exact.len() as f64
    };
    println!("mean KL divergence at 2 bits: fitted on the way {:.2e}, calibrated {:.2e}", kl(&fitted), kl(&coded));
    assert!(kl(&fitted) < 1e-3 && kl(&coded) > 1e-6 && kl(&coded) < 1e-3, "{} {}", kl(&fitted), kl(&coded));
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    logits.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
}

#[test]
fn a_basis_of_another_model_or_rope_is_refused() {
    let mut probe = start();
    let good = std::fs::read(basis()).unwrap();
    let mut refused = |name: &str, bytes: Option<&[u8]>, reason: &str| {
        let path = scratch(name);
        let _ = std::fs::remove_file(&path);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).unwrap();
        }
        let e = probe.open(&spec(calibrated(2.0, &path), 64)).expect_err(name).to_string();
        assert!(e.contains(reason), "{name}: {e}");
    };
    refused("missing.skv", None, "cannot be read");
    refused("empty.skv", Some(&[]), "not a calibration");
    refused("half.skv", Some(&good[..good.len() / 2]), "truncated");
    // The file itself, for a model with another number in its last norm, or with other RoPE settings.
    let gguf = std::fs::read(model()).unwrap();
    let key = b"rope.freq_base";
    let freq_base = gguf.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    for (at, byte, same_hash, reason) in [(norm_data(&gguf), 0, false, "another model"), (freq_base, 1, true, "other RoPE settings")] {
        let mut changed = gguf.clone();
        changed[at + byte] ^= 1;
        let other = scratch("other.gguf");
        std::fs::write(&other, &changed).unwrap();
        let mut second = Probe::start(bin(), &other, 1).unwrap();
        assert_eq!(second.info().hash == probe.info().hash, same_hash, "{reason}");
        let e = second.open(&spec(calibrated(2.0, basis()), 64)).expect_err(reason).to_string();
        assert!(e.contains(reason), "{e}");
        std::fs::remove_file(other).unwrap();
    }
}

#[test]
fn the_tools_take_a_basis() {
    let works = |basis: &Path| {
        let args = ["-p", "x", "-n", "1", "-no-cnv", "-t", "1", "--kv-spectral", "--kv-spectral-basis", basis.to_str().unwrap()];
        spectral_kv(&[&["llama", "completion", "-m", &model()][..], &args].concat()).status.success()
    };
    assert!(works(basis()) && !works(Path::new("/nowhere.skv")));
}

/// Where the numbers of `output_norm.weight` begin in a GGUF file.
fn norm_data(gguf: &[u8]) -> usize {
    let word = |at: usize| u32::from_le_bytes(gguf[at..at + 4].try_into().unwrap()) as usize;
    let long = |at: usize| u64::from_le_bytes(gguf[at..at + 8].try_into().unwrap()) as usize;
    let mut at = 24;
    for _ in 0..long(16) {
        let kind_at = at + 8 + long(at);
        at = behind_value(gguf, word(kind_at), kind_at + 4);
    }
    let mut norm = None;
    for _ in 0..long(8) {
        let name = &gguf[at + 8..at + 8 + long(at)];
        let dims_at = at + 8 + name.len();
        let offset_at = dims_at + 4 + 8 * word(dims_at) + 4;
        if name == b"output_norm.weight" {
            norm = Some(long(offset_at));
        }
        at = offset_at + 8;
    }
    at.next_multiple_of(32) + norm.unwrap()
}

/// The end of a metadata value of a GGUF file.
fn behind_value(gguf: &[u8], kind: usize, at: usize) -> usize {
    let long = |at: usize| u64::from_le_bytes(gguf[at..at + 8].try_into().unwrap()) as usize;
    match kind {
        0 | 1 | 7 => at + 1,
        2 | 3 => at + 2,
        4..=6 => at + 4,
        8 => at + 8 + long(at),
        9 => {
            let inner = u32::from_le_bytes(gguf[at..at + 4].try_into().unwrap()) as usize;
            (0..long(at + 4)).fold(at + 12, |at, _| behind_value(gguf, inner, at))
        }
        _ => at + 8,
    }
}

fn diff(name: &str, args: &[&str]) -> (Vec<Value>, String, Vec<u8>) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(name);
    let prompt = format!("{ROOT}/tests/data/prompt.txt");
    let out = spectral_kv(&[&["diff", "-m", &model(), "-f", &prompt, "-t", "1", "-o", path.to_str().unwrap()], args].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let bytes = std::fs::read(path).unwrap();
    let lines = String::from_utf8(bytes.clone()).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    (lines, String::from_utf8(out.stdout).unwrap(), bytes)
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let args = ["-n", "12", "--temp", "1", "--layers", "--kv-spectral", "8"];
    let (lines, text, first) = diff("first.jsonl", &[&args[..], &["--seed", "7"]].concat());
    assert!(first == diff("second.jsonl", &[&args[..], &["--seed", "7"]].concat()).2);
    assert_ne!(lines[5], diff("third.jsonl", &[&args[..], &["--seed", "8"]].concat()).0[5]);
    assert_eq!(lines.len(), 14);
    assert_eq!((&lines[0]["seed"], &lines[0]["prompt_tokens"], &lines[1]["position"]), (&json!(7), &json!(1859), &json!(1859)));
    for line in &lines[1..13] {
        let errors = line["attention_error"].as_array().unwrap();
        assert!(errors.len() == 3 && errors.iter().flat_map(|l| l.as_array().unwrap()).all(|e| e.as_f64().unwrap() < 1.0), "{line}");
        assert!(line["kl"].as_f64().unwrap() > 0.0 && line["f16"]["p"].as_f64().unwrap() > 0.0, "{line}");
    }
    assert!(text.contains("12 tokens: KL divergence") && text.contains("relative error of the attention output, mean of 12 steps"), "{text}");
}

#[test]
fn diff_is_zero_with_a_window_as_long_as_the_context() {
    let (lines, text, _) = diff("window.jsonl", &["-n", "24", "-c", "2048", "--window", "2048"]);
    let summary = lines.last().unwrap();
    assert!(summary["max_kl"].as_f64().unwrap() < 1e-4 && summary["agreement"] == 1.0 && summary["first_divergence"].is_null(), "{summary}");
    assert!(text.contains("first divergence none"), "{text}");
}

#[test]
fn diff_stops_at_the_first_divergence() {
    // Few bits, an empty window and high temperature: the choices differ soon.
    let args = ["-n", "100", "--temp", "1.5", "--kv-spectral", "64", "--bits", "0.3", "--window", "0", "--layers", "--stop"];
    let (lines, text, _) = diff("stop.jsonl", &args);
    let (last, summary) = (&lines[lines.len() - 2], &lines[lines.len() - 1]);
    assert!(lines.len() < 102 && last["same"] == false && summary["first_divergence"] == last["position"], "{summary}");
    assert!(lines[1..lines.len() - 2].iter().all(|l| l["same"] == true && l["first_divergence"].is_null()));
    for side in ["f16", "spectral"] {
        let top = last["first_divergence"][side].as_array().unwrap();
        assert!(top.len() == 5 && top.windows(2).all(|w| w[0]["p"].as_f64() >= w[1]["p"].as_f64()), "{last}");
    }
    assert!(text.contains("first divergence, the likeliest tokens:") && text.contains("layer     mean    worst  head"), "{text}");

    let too_long = spectral_kv(&["diff", "-m", &model(), "-p", "x", "-n", "600", "-c", "512"]);
    assert!(!too_long.status.success() && String::from_utf8_lossy(&too_long.stderr).contains("raise -c"));
}
