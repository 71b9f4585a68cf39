//! `spectral-kv eval` from end to end on the small model: the same numbers each time, also after an interruption, and in
//! the order that cannot be otherwise.
//!
//! Builds llama.cpp on the first run.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// In a context of 1024 the spectral cache makes its first fit after 512 rows, inside of a text of 640.
const SETTINGS: &str = "f16,q8_0,q4_0,q4_0+window,turbo2+window,spectral-2b,spectral-5b";

fn eval(out: &Path, args: &str, files: &[(&str, &Path)]) -> (Vec<u8>, String) {
    let mut eval = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    eval.args("eval -t 1 --texts 1".split(' ')).args(args.split(' ')).args(["-m", &format!("{ROOT}/tests/models/bench-a-f16.gguf")]);
    files.iter().for_each(|(option, file)| _ = eval.arg(option).arg(file));
    let result = eval.arg("-o").arg(out).stdin(Stdio::null()).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    (std::fs::read(out.join("eval.json")).unwrap(), String::from_utf8(result.stdout).unwrap())
}

fn row<'a>(path: &'a Value, name: &str) -> &'a Value {
    path["rows"].as_array().unwrap().iter().find(|r| r["setting"] == name).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn sum(value: &Value) -> f64 {
    list(value).iter().map(|x| x.as_f64().unwrap()).sum()
}

#[test]
fn the_same_numbers_twice_and_after_an_interruption() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("eval");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let texts = ["tests/data/prompt.txt", "vendor/README.md"].map(|f| Path::new(ROOT).join(f));
    let eval = |out: PathBuf| {
        let args = format!("-c 1024 --length 640 --needles 1 --paths decode,prefill --step 8 --settings {SETTINGS}");
        eval(&out, &args, &[("-f", &texts[0]), ("--switch", &texts[1])]).0
    };

    let first = eval(dir.join("a"));
    assert!(first == eval(dir.join("a")), "numbers that were kept");
    // As if the run had not come to its end: not all parts are there.
    let parts = |run: &str| {
        let mut files: Vec<_> = std::fs::read_dir(dir.join(run).join("parts")).unwrap().map(|f| f.unwrap().path()).collect();
        files.sort();
        files
    };
    std::fs::create_dir_all(dir.join("b/parts")).unwrap();
    for (_, part) in parts("a").iter().enumerate().filter(|(i, _)| i % 3 != 0) {
        std::fs::copy(part, dir.join("b/parts").join(part.file_name().unwrap())).unwrap();
    }
    assert!(first == eval(dir.join("b")), "numbers that were made again in part");
    assert_eq!(parts("a").len(), parts("b").len());

    let summary: Value = serde_json::from_slice(&first).unwrap();
    let page = std::fs::read_to_string(dir.join("a/eval.html")).unwrap();
    assert!(page.matches("<svg").count() >= 10 && !page.contains("<script") && !page.contains("src="), "a page of its own");
    for path in summary["paths"].as_array().unwrap() {
        let row = |name: &str| row(path, name);
        let kl = |name: &str| row(name)["text"]["kl_mean"].as_f64().unwrap();
        let [f16, q8_0, q4_0, windowed, turbo, ours] = ["f16", "q8_0", "q4_0", "q4_0+window", "turbo2+window", "spectral-2b"].map(kl);
        println!("{}: q8_0 {q8_0:.6}, q4_0 {q4_0:.6}, with a window {windowed:.6}, turbo2 {turbo:.6}, spectral {ours:.6}", path["path"]);
        assert_eq!(f16, 0.0);
        assert!(0.0 < q8_0 && q8_0 < q4_0, "8 bits against 4");
        assert!(0.0 < windowed && windowed < q4_0, "with a window against without");
        assert!(windowed < turbo, "4 bits against 2");
        for name in SETTINGS.split(',') {
            let (row, is_f16) = (row(name), name == "f16");
            assert_eq!(row["continuation"]["kl_mean"].as_f64() == Some(0.0), is_f16, "{name}");
            assert_eq!(row["heads"].as_array().unwrap().iter().map(|l| l.as_array().unwrap().len()).collect::<Vec<_>>(), [4, 4, 4]);
            assert_eq!(row["heads"].as_array().unwrap().iter().all(|l| l.as_array().unwrap().iter().all(|e| e == 0.0)), is_f16, "{name}");
            assert!(row["greedy"]["agreeing"].as_u64() <= row["greedy"]["tokens"].as_u64());
            assert!(!is_f16 || row["greedy"]["agreeing"] == row["greedy"]["tokens"]);
            let law = &row["law"];
            assert_eq!(law.is_null(), is_f16, "{name}");
            if !is_f16 {
                // The divergence is shared out over 3 layers, and a layer's over keys and values of 2 heads.
                let whole: f64 = list(&law["shares"]).iter().map(|l| l["whole"].as_f64().unwrap()).sum();
                let parts: f64 = list(&law["shares"]).iter().map(|l| sum(&l["keys"]) + sum(&l["values"])).sum();
                let kl = kl(name);
                assert!((whole / kl - 1.0).abs() < 1e-9 && (parts / kl - 1.0).abs() < 1e-9, "{name}: {law}");
                println!("{name}: the law says {}, {kl} was measured", law["says"]);
                let is_near = (0.1..10.0).contains(&(law["says"].as_f64().unwrap() / kl));
                assert!(is_near && list(&law["terms"]).iter().all(|t| list(&t["keys"]).len() == 2), "{name}: {law}");
            }
        }
        // The spectral settings make a curve that every other one is beside.
        let beside: Vec<&str> = list(&path["equal_bytes"]).iter().map(|b| b["point"]["setting"].as_str().unwrap()).collect();
        assert_eq!(beside, ["q4_0", "q8_0", "q4_0+window", "turbo2+window"]);
    }
    // The formats' own sizes, and the ratio that was asked for.
    let ratio = |name: &str| summary["settings"].as_array().unwrap().iter().find(|s| s["name"] == name).unwrap()["ratio"].as_f64().unwrap();
    assert_eq!((ratio("f16"), (ratio("q8_0") * 8.5).round(), (ratio("q4_0") * 4.5).round()), (1.0, 16.0, 16.0));
}

#[test]
fn duplicates_beginnings_and_going_back() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("eval-scenarios");
    let _ = std::fs::remove_dir_all(&dir);
    let text = Path::new(ROOT).join("tests/data/prompt.txt");
    let code = Path::new(ROOT).join("cli/src/diff.rs");
    let args = "-c 4096 --length 640 --paths decode --step 64 --settings q4_0+window,turbo2+window@1v,spectral-1b \
                --scenarios functions,beginnings,rewind --code-length 3000 --beginning 1200 --rewind 64,400";
    let (json, shown) = eval(&dir, args, &[("-f", &text), ("--code", &code)]);
    let summary: Value = serde_json::from_slice(&json).unwrap();
    let path = &summary["paths"][0];
    for row in list(&path["rows"]) {
        let is_f16 = row["setting"] == "f16";
        assert!(row["text"].is_null() && row["law"].is_null() && row["functions"]["asked"] == 50, "{row}");
        assert!(row["functions"]["found"].as_f64().unwrap() <= 1.0 && list(&row["functions"]["by_depth"]).len() == 8);
        let kinds: Vec<&str> = list(&row["beginnings"]).iter().map(|b| b["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["none", "hello", "spaces", "base64", "log"]);
        let rewinds = list(&row["rewinds"]);
        assert_eq!(rewinds.iter().map(|r| r["tokens"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 64, 400]);
        assert!(rewinds.iter().all(|r| list(&r["kl_mean_by_place"]).len() == 3 && (r["kl_mean"] == 0.0) == is_f16), "{row}");
        let kl = |of: &Value| of["divergence"]["kl_mean"].as_f64().unwrap();
        assert!(list(&row["beginnings"]).iter().all(|b| (kl(b) == 0.0) == is_f16), "{row}");
    }
    // What has left the window comes back coded.
    let back = |i: usize| row(path, "q4_0+window")["rewinds"][i]["kl_mean"].as_f64().unwrap();
    assert!(back(2) > back(0), "{} {}", back(2), back(0));
    assert!(shown.contains("Near duplicates") && shown.contains("400 back") && !shown.contains("same top-1"), "{shown}");
}
