//! The level that `SPECTRAL_KV_CPU_LEVEL` names, as a program meets it: each case in a process of its own, because the level is chosen once.

use spectral_kv::cache::Cache;
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::rope::RopeParams;
use spectral_kv::simd::{at, kernels, Level};
use std::process::Command;

/// What the process prints that makes a cache.
const ANSWER: &str = "answer: ";

/// Makes a cache and says what became of it. Does so when another test asks for it; run by itself it shows the level of the environment.
#[test]
fn a_cache_of_this_process() {
    let shape = LayerShape { n_head: 2, n_head_kv: 1, d_k: 64, d_v: 64 };
    let config = Config { n_cells: 1024, ..Config::default() };
    match Cache::new(&config, shape, &RopeParams::none(), Scoring { scale: 1.0, softcap: 0.0 }, &[]) {
        Ok(_) => println!("{ANSWER}{}", kernels().level.name()),
        Err(e) => println!("{ANSWER}{} {e}", e.code()),
    }
}

fn answer(level: Option<&str>) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_cache_of_this_process", "--nocapture"]).env_remove("SPECTRAL_KV_CPU_LEVEL");
    child.envs(level.map(|level| ("SPECTRAL_KV_CPU_LEVEL", level)));
    let out = child.output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{text}");
    text.lines().find_map(|line| line.split_once(ANSWER)).unwrap().1.to_string()
}

#[test]
fn a_level_is_had_or_refused() {
    let best = answer(None);
    assert_eq!(answer(Some("")), best);
    for level in Level::ALL {
        let want = match at(level) {
            Some(_) => level.name().to_string(),
            None => format!("102 invalid configuration: SPECTRAL_KV_CPU_LEVEL={}: this CPU has no more than {best}", level.name()),
        };
        assert_eq!(answer(Some(level.name())), want);
    }
    let known = "no such level; there are portable, avx2, avx512, avx512vnni, neon";
    assert_eq!(answer(Some("sse")), format!("102 invalid configuration: SPECTRAL_KV_CPU_LEVEL=sse: {known}"));
}
