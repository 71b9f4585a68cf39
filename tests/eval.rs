//! `spectral-kv eval` from end to end on the small model: the same numbers each time, also after an interruption, and in
//! the order that cannot be otherwise.
//!
//! Builds llama.cpp on the first run.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// In a context of 1024 the spectral cache makes its first fit after 512 rows, inside of a text of 640.
const SETTINGS: &str = "f16,q8_0,q4_0,q4_0+window,turbo2+window,spectral-2b";

fn eval(out: &Path, texts: &[PathBuf]) -> Vec<u8> {
    let mut eval = Command::new(env!("CARGO_BIN_EXE_spectral-kv"));
    eval.args("eval -t 1 -c 1024 --length 640 --texts 1 --needles 1 --paths decode,prefill --step 8".split(' '));
    eval.args(["--settings", SETTINGS, "-m", &format!("{ROOT}/tests/models/bench-a-f16.gguf")]);
    eval.arg("-f").arg(&texts[0]).arg("--switch").arg(&texts[1]).arg("-o").arg(out);
    let result = eval.stdin(Stdio::null()).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    std::fs::read(out.join("eval.json")).unwrap()
}

#[test]
fn the_same_numbers_twice_and_after_an_interruption() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("eval");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let texts = ["tests/data/prompt.txt", "vendor/README.md"].map(|f| Path::new(ROOT).join(f)).to_vec();

    let first = eval(&dir.join("a"), &texts);
    assert!(first == eval(&dir.join("a"), &texts), "numbers that were kept");
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
    assert!(first == eval(&dir.join("b"), &texts), "numbers that were made again in part");
    assert_eq!(parts("a").len(), parts("b").len());

    let summary: Value = serde_json::from_slice(&first).unwrap();
    let page = std::fs::read_to_string(dir.join("a/eval.html")).unwrap();
    assert!(page.matches("<svg").count() >= 10 && !page.contains("<script") && !page.contains("src="), "a page of its own");
    for path in summary["paths"].as_array().unwrap() {
        let row = |name: &str| path["rows"].as_array().unwrap().iter().find(|r| r["setting"] == name).unwrap();
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
        }
    }
    // The formats' own sizes, and the ratio that was asked for.
    let ratio = |name: &str| summary["settings"].as_array().unwrap().iter().find(|s| s["name"] == name).unwrap()["ratio"].as_f64().unwrap();
    assert_eq!((ratio("f16"), (ratio("q8_0") * 8.5).round(), (ratio("q4_0") * 4.5).round()), (1.0, 16.0, 16.0));
}
