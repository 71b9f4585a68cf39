//! `spectral-kv bench` from end to end, at depths that are no measurement: every row is there, and the ratios are those of the
//! speeds. How fast anything is cannot be a test.
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

fn median(row: &Value, cache: &str) -> f64 {
    row["timings"].as_array().unwrap().iter().find(|t| t["cache"] == cache).unwrap()["median_ts"].as_f64().unwrap()
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
    let (table, json) = bench("small", &args);
    assert_eq!((&json["repetitions"], &json["rounds"], &json["level"]), (&3.into(), &2.into(), &"portable".into()));
    let [model] = json["models"].as_array().unwrap().as_slice() else { panic!("one model") };
    let keys: Vec<_> =
        rows(model).iter().map(|r| (r["what"].as_str().unwrap(), r["depth"].as_u64().unwrap(), r["sequences"].as_u64().unwrap())).collect();
    assert_eq!(keys, [("decode", 0, 1), ("decode", 64, 1), ("prefill", 64, 1), ("batch", 700, 8)]);
    for row in rows(model) {
        let timings = row["timings"].as_array().unwrap();
        assert_eq!(timings.iter().map(|t| t["cache"].as_str().unwrap()).collect::<Vec<_>>(), ["f16", "spectral", "q8_0"]);
        for t in timings {
            let mut samples: Vec<f64> = t["samples_ts"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            samples.sort_by(f64::total_cmp);
            assert!(samples.len() == 6 && samples[0] > 0.0, "{t}");
            same(&t["median_ts"], (samples[2] + samples[3]) / 2.0);
        }
        assert_eq!(row["ratios"].as_object().unwrap().len(), 2);
        for cache in ["f16", "q8_0"] {
            same(&row["ratios"][cache], median(row, "spectral") / median(row, cache));
        }
    }
    let shares = model["outside_attention"].as_array().unwrap();
    assert_eq!(shares.len(), 3);
    for s in shares {
        let cache = s["cache"].as_str().unwrap();
        same(&s["share"], median(&rows(model)[1], cache) / median(&rows(model)[0], cache));
    }
    for shown in ["decode at 64", "prefill of 80 at 64", "8 sequences at 700", "stock q8_0", "/ f16", "at level portable", "outside attention at 64"]
    {
        assert!(table.contains(shown), "{shown} in:\n{table}");
    }
}

#[test]
fn llama_cpp_reads_the_model_of_random_weights() {
    let (table, json) = bench("attention", "--model attention -r 1 --what decode --depths 16 --types f16");
    assert!(table.contains("32/8 heads of 128"), "{table}");
    assert!(median(&rows(&json["models"][0])[0], "spectral") > 0.0);
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
