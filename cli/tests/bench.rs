//! `spectral-kv bench` from end to end, at depths that are no measurement: every row is there, and the ratios are those of the
//! speeds, parts those of the time. How fast anything is cannot be a test.
//!
//! Builds both llama.cpp trees on the first run.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The command's table, and its JSON.
fn bench(name: &str, args: &str) -> (String, Value) {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{name}.json"));
    let mut bench = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    bench.args("bench -t 1 -n 4 -p 80".split(' ')).args(args.split(' ')).arg("-o").arg(&file);
    let out = bench.stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (String::from_utf8(out.stdout).unwrap(), serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap())
}

fn rows(model: &Value) -> &[Value] {
    model["rows"].as_array().unwrap()
}

fn timings(row: &Value) -> &[Value] {
    row["timings"].as_array().unwrap()
}

/// As it was faster.
fn median(row: &Value, cache: &str) -> f64 {
    timings(row).iter().filter(|t| t["cache"] == cache).map(|t| t["median_ts"].as_f64().unwrap()).fold(0.0, f64::max)
}

/// A decoded token's time, of the spectral cache: whole, and its parts.
fn parts(row: &Value) -> [f64; 5] {
    let t = timings(row).iter().find(|t| t["cache"] == "spectral").unwrap();
    ["token_ms", "attention_ms", "storing_ms", "host_ms", "rest_ms"].map(|part| t["parts"][part].as_f64().unwrap())
}

/// Equal but for the last digit, which reading JSON may change.
fn same(got: &Value, want: f64) {
    let got = got.as_f64().unwrap();
    assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
}

#[test]
fn all_rows_are_there_and_ratios_are_quotients() {
    let model = format!("{ROOT}/tests/models/bench-a-f16.gguf");
    let args = format!("--model {model} -r 3 --rounds 2 --depths 0,64 --prefill-depths 64 --batch-depth 700 --types f16,q8_0 --level portable");
    let plot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-small.svg");
    let (table, json) = bench("small", &format!("{args} --plot {}", plot.display()));
    assert_eq!((&json["repetitions"], &json["rounds"], &json["level"]), (&3.into(), &2.into(), &"portable".into()));
    let [model] = json["models"].as_array().unwrap().as_slice() else { panic!("one model") };
    let keys: Vec<_> =
        rows(model).iter().map(|r| (r["what"].as_str().unwrap(), r["depth"].as_u64().unwrap(), r["sequences"].as_u64().unwrap())).collect();
    assert_eq!(keys, [("decode", 0, 1), ("decode", 64, 1), ("prefill", 64, 1), ("batch", 700, 8)]);
    for row in rows(model) {
        let caches: Vec<_> = timings(row).iter().map(|t| (t["cache"].as_str().unwrap(), t["fa"].as_str().unwrap())).collect();
        assert_eq!(caches, [("f16", "on"), ("f16", "off"), ("spectral", "on"), ("q8_0", "on")]);
        let faster = timings(row)[..2].iter().max_by(|a, b| a["median_ts"].as_f64().unwrap().total_cmp(&b["median_ts"].as_f64().unwrap())).unwrap();
        assert_eq!((&row["best_fa"]["f16"], &row["best_fa"]["q8_0"]), (&faster["fa"], &"on".into()));
        for t in timings(row) {
            let mut samples: Vec<f64> = t["samples_ts"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            samples.sort_by(f64::total_cmp);
            assert!(samples.len() == 6 && samples[0] > 0.0, "{t}");
            same(&t["median_ts"], (samples[2] + samples[3]) / 2.0);
            // The process holds the model at least, and not all that a machine has.
            assert!(!cfg!(target_os = "linux") || (1 << 20..1 << 32).contains(&t["peak_bytes"].as_u64().unwrap()), "{t}");
            assert_eq!(t["parts"].is_object(), t["cache"] == "spectral" && row["what"] == "decode");
        }
        assert_eq!(row["ratios"].as_object().unwrap().len(), 2);
        for cache in ["f16", "q8_0"] {
            same(&row["ratios"][cache], median(row, "spectral") / median(row, cache));
        }
    }
    for row in &rows(model)[..2] {
        let [whole, attention, storing, host, rest] = parts(row);
        assert!((attention + storing + host + rest - whole).abs() < 1e-9 * whole);
        assert!(attention > 0.0 && storing > 0.0 && host > 0.0 && rest > 0.0, "{row}");
    }
    let shares = model["outside_attention"].as_array().unwrap();
    assert_eq!(shares.len(), 3);
    for s in shares {
        let cache = s["cache"].as_str().unwrap();
        same(&s["share"], median(&rows(model)[1], cache) / median(&rows(model)[0], cache));
        let ms = |row: usize| 1e3 / median(&rows(model)[row], cache);
        assert!((s["attention_ms"].as_f64().unwrap() - (ms(1) - ms(0))).abs() < 1e-9 * ms(1));
    }
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(["stock f16", "stock q8_0", "spectral", "tokens/s"].iter().all(|shown| svg.contains(shown)), "{svg}");
    let shown = ["attention alone at 64", "ms/token", "most MiB"];
    assert!(shown.iter().all(|shown| table.contains(shown)) && (table.contains("fa on") || table.contains("fa off")), "{table}");
    for shown in ["decode at 64", "prefill of 80 at 64", "8 sequences at 700", "stock q8_0", "/ f16", "at level portable", "outside attention at 64"]
    {
        assert!(table.contains(shown), "{shown} in:\n{table}");
    }
}

#[test]
fn the_library_is_measured_without_any_model() {
    let (table, json) = bench("host", "--what host --host-cells 2048,8192");
    assert_eq!(json["models"], Value::Array(vec![]));
    let host = json["host"].as_array().unwrap();
    assert_eq!(host.iter().map(|h| h["cells"].as_u64().unwrap()).collect::<Vec<_>>(), [2048, 8192]);
    for h in host {
        let ns = |name: &str| h[name].as_u64().unwrap();
        assert!(ns("ns_plan") > 0 && ns("ns_plan") <= ns("ns_plan_most") && ns("ns_commit") <= ns("ns_commit_most"), "{h}");
    }
    assert!(table.contains("8192 cells") && !table.contains("tokens/s"), "{table}");
}

#[test]
fn llama_cpp_reads_the_model_of_random_weights() {
    let (table, json) = bench("attention", "--model attention -r 1 --what decode --depths 16 --types f16 --fa on");
    assert!(table.contains("32/8 heads of 128"), "{table}");
    assert!(median(&rows(&json["models"][0])[0], "spectral") > 0.0);
    assert_eq!(timings(&rows(&json["models"][0])[0]).len(), 2, "without -fa off");
}

#[test]
fn a_plot_without_points_is_refused_before_anything_is_measured() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    let out = bench.args("bench --what decode --depths 0 --plot none.svg".split(' ')).stdin(Stdio::null()).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("above 0"), "{out:?}");
}

#[test]
fn a_failing_tool_is_quoted() {
    let model = format!("{ROOT}/tests/data/prompt.txt");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    let out = bench.args(["bench", "-r", "1", "--what", "decode", "--model", &model]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("cannot measure prompt.txt, decode at 512, stock f16") && said.contains("failed to load model"),
        "{said}"
    );
}
