//! Attention and rotary embedding against ggml's own, call by call, with no model between: the CPU backend of the stock build computes
//! `ggml_flash_attn_ext` over the rows that a layer holds, and `ggml_rope_ext` ropes the keys and queries that go into it.
//!
//! Builds stock llama.cpp with the `spectral-kv` command (minutes on the first run, seconds after it).

mod backend;
#[allow(dead_code, non_camel_case_types, non_snake_case, clippy::all, reason = "as bindgen writes it")]
#[rustfmt::skip]
mod bindings;
#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../common/perplexity.rs"]
#[allow(dead_code, reason = "the build is what is used of it")]
mod perplexity;

use backend::{Attention, Backend};
use common::{input, rel_rms, rows_of, widen, Input, Random, Reference, Stream, Tokens};
use half::f16;

use spectral_kv::cache::{Call, Location, Mask, Plan};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::layout::MAX_QUERIES;
use spectral_kv::rope::{Pairing, Rope, RopeParams, Turn};
use std::sync::OnceLock;

const CELLS: u32 = 900;
const KV_HEADS: usize = 2;

fn ggml() -> &'static Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    BACKEND.get_or_init(|| Backend::load(perplexity::stock()))
}

fn plain(d: usize) -> RopeParams {
    RopeParams::plain(Pairing::Halves, d, 10000.0)
}

/// The ropes of llama.cpp's models: none, NEOX, with linear scaling, with YaRN, with a divisor for each pair, of a part of the head, and NORM.
fn ropes(d: usize) -> [RopeParams; 7] {
    let factors = (0..d / 2).map(|i| 1.0 + i as f32 / 8.0).collect();
    [
        RopeParams::none(),
        plain(d),
        RopeParams { freq_scale: 0.25, ..plain(d) },
        RopeParams { freq_scale: 0.25, ext_factor: 1.0, n_ctx_orig: 2048, ..plain(d) },
        RopeParams { freq_factors: factors, freq_base: 500_000.0, ..plain(d) },
        RopeParams { n_dims: d / 4 * 2, ..plain(d) },
        RopeParams::plain(Pairing::Adjacent, d, 10000.0),
    ]
}

/// How a step looks at its rows.
#[derive(Clone, Copy, Default)]
struct Look {
    softcap: f32,
    sinks: bool,
    /// Some rows are hidden, and some scores get something added.
    masked: bool,
    /// A token that sees nothing at all.
    blind: Option<usize>,
}

/// The largest relative errors over tokens and heads: one wrong head must not hide among right ones.
#[derive(Debug)]
struct Errors {
    /// Ours against ggml's, both with what the layer holds in f32.
    to_ggml: f64,
    /// Ours against f64.
    ours: f64,
    /// ggml's against f64.
    ggml: f64,
    /// The same as llama.cpp calls it, with rows in f16.
    stock: f64,
}

impl Errors {
    /// Of outputs `[token][head][d_v]`.
    fn of(d_v: usize, exact: &[f64], [ours, ggml, stock]: [&[f64]; 3]) -> Self {
        let heads = || exact.chunks_exact(d_v).enumerate().filter(|(_, x)| x.iter().any(|x| *x != 0.0)).map(|(i, _)| i * d_v..(i + 1) * d_v);
        let most = |a: &[f64], b: &[f64]| heads().map(|h| rel_rms(a[h.clone()].iter().copied(), b[h].iter().copied())).fold(0.0, f64::max);
        Errors { to_ggml: most(ours, ggml), ours: most(ours, exact), ggml: most(ggml, exact), stock: most(stock, exact) }
    }

    /// `limit` is what may be between ours and the rows' exact attention.
    fn check(&self, limit: f64, what: &str) {
        println!("{what}: {self:?}");
        // Sums of some hundred products in f32, in one order or another.
        const SUMS: f64 = 4e-6;
        // With rows in f16, ggml has queries and sums of few tokens in f16 as well: half a unit for each row that is added.
        let halves = 2f64.powi(-12) * f64::from(CELLS).sqrt();
        let Errors { to_ggml, ours, ggml, stock } = *self;
        assert!(ggml < SUMS && ours < limit.max(SUMS) && to_ggml < limit.max(SUMS) && stock < halves, "{what}: {self:?}");
    }
}

/// A layer whose keys and queries ggml has roped; all that goes in is f16, so that ggml can be given the same.
struct Roped {
    stream: Stream,
    rope: RopeParams,
}

impl Roped {
    /// With the newest `window` rows exact.
    fn new(group: usize, d_k: usize, d_v: usize, rope: RopeParams, window: u32) -> Self {
        let config = Config { n_cells: CELLS, window, bits: 3.0, ..Config::default() };
        let [n_head, n_head_kv, d_k, d_v] = [group * KV_HEADS, KV_HEADS, d_k, d_v].map(|x| x as u32);
        Roped { stream: Stream::new(&config, &[LayerShape { n_head, n_head_kv, d_k, d_v }], |_| rope.clone()), rope }
    }

    /// The next `n` tokens of the sequence in the first free cells, and their rows before the rotary embedding.
    fn tokens(&mut self, seed: u64, n: usize) -> (Tokens, Input) {
        let (cells, first) = (self.stream.free()[..n].to_vec(), self.stream.next_pos(0));
        let places: Vec<_> = (0..n as i32).map(|i| (first + i, 0)).collect();
        let positions: Vec<i32> = places.iter().map(|p| p.0).collect();
        let g = *self.stream.layers[0].shape();
        let x = input(seed, &positions, g.n_head, g.n_head_kv, g.d_k, g.d_v, &RopeParams::none());
        let rounded = |x: Vec<f32>| x.into_iter().map(|x| f16::from_f32(x).to_f32()).collect::<Vec<_>>();
        let roped = |x: &[f32]| rounded(ggml().rope(&self.rope, &positions, g.d_k, x));
        let mut tokens = self.stream.tokens(seed, &cells, &places);
        tokens.inputs[0] = Input { q: roped(&x.q), k: roped(&x.k), v: rounded(x.v.clone()) };
        self.stream.enter(&tokens);
        (tokens, x)
    }

    fn store(&mut self, ints: &[i32], tokens: &Tokens) {
        self.stream.run(0, ints, tokens).unwrap();
        self.stream.table.commit().unwrap();
    }

    /// `n` tokens in steps of 100; gives the keys before the rotary embedding, in the order of the cells.
    fn append(&mut self, seed: u64, n: usize) -> Vec<f32> {
        let mut keys = Vec::new();
        for at in (0..n).step_by(100) {
            let (tokens, x) = self.tokens(seed + at as u64, 100.min(n - at));
            let ints = self.stream.plan(&tokens.cells).unwrap();
            self.store(&ints, &tokens);
            keys.extend(x.k);
        }
        keys
    }

    /// How many rows are codes.
    fn coded(&self) -> usize {
        let place = |c: &u32| self.stream.table.locate(*c as usize).map(|(at, _)| at);
        self.stream.live().iter().filter(|c| matches!(place(c), Some(Location::Coded(..)))).count()
    }

    /// One step of `n` tokens: attention of the decode path, if they are few enough for it, or else of the prefill path.
    fn step(&mut self, seed: u64, n: usize, look: Look) -> Errors {
        let (t, _) = self.tokens(seed, n);
        let ints = self.stream.plan(&t.cells).unwrap();
        let (plan, l) = (Plan::parse(&ints).unwrap(), &self.stream.layers[0]);
        let (g, n_kv, mask) = (*l.shape(), CELLS as usize, self.mask(seed, &t, look));
        let mut draw = Random::new(seed);
        let sinks: Vec<f32> = (0..if look.sinks { g.n_head } else { 0 }).map(|_| 2.0 * draw.normal()).collect();
        let scoring = Scoring { scale: 1.0 / (g.d_k as f32).sqrt(), softcap: look.softcap };
        let [q, k, v] = rows_of(l, &t.inputs[0], n);
        let arena = self.stream.arena();
        let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring, mask: Mask::F16 { values: &mask, stride: n_kv, n_kv } };
        let mut ours = vec![f32::NAN; n * g.n_head * g.d_v];
        if n <= MAX_QUERIES {
            let mut partials = vec![f32::NAN; l.partial_floats(n)];
            l.attend(0..l.units(), &call, &mut partials).unwrap();
            l.combine(n, &partials, &sinks, 0..n * g.n_head, &mut ours).unwrap();
        } else {
            let put = |at: usize, x: &[f32]| ours[at * g.d_v..(at + 1) * g.d_v].copy_from_slice(x);
            l.prefill(0..l.prefill_pieces(n), &call, &sinks, put).unwrap();
        }

        let mut dense_k = vec![f16::ZERO; n_kv * g.n_head_kv * g.d_k];
        let mut dense_v = vec![f16::ZERO; n_kv * g.n_head_kv * g.d_v];
        l.reconstruct(arena, &plan, &k, &v, 0..n_kv, &mut dense_k, &mut dense_v).unwrap();
        let (n_head, n_head_kv, d_k, d_v) = (g.n_head, g.n_head_kv, g.d_k, g.d_v);
        let Scoring { scale, softcap } = scoring;
        let queries = &t.inputs[0].q;
        let a = Attention { n_head, n_head_kv, d_k, d_v, q: queries, k: &dense_k, v: &dense_v, mask: &mask, sinks: &sinks, scale, softcap };
        let (wide_k, wide_v) = (widen(&dense_k), widen(&dense_v));
        let (scale, softcap, some) = (f64::from(scale), f64::from(softcap), look.sinks.then_some(&sinks[..]));
        let reference = Reference { n_head, n_head_kv, d_k, d_v, k: &wide_k, v: &wide_v, scale, softcap, sinks: some };
        let exact = reference.attend(queries, n, |t, r| mask[t * n_kv + r].to_f64());
        let all = [ours, ggml().attend_f32(&a), ggml().attend_f16(&a)].map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
        if let Some(blind) = look.blind {
            let row = blind * n_head * d_v..(blind + 1) * n_head * d_v;
            assert!(all.iter().all(|x| x[row.clone()].iter().all(|x| *x == 0.0)), "a token that sees nothing gives zeros");
        }
        self.store(&ints, &t);
        Errors::of(d_v, &exact, all.each_ref().map(|x| &x[..]))
    }

    /// Causal; of the rows that a token may see, `look` hides some.
    fn mask(&self, seed: u64, t: &Tokens, look: Look) -> Vec<f16> {
        let (n_kv, mut draw) = (CELLS as usize, Random::new(seed));
        let mut mask = vec![f16::NEG_INFINITY; t.cells.len() * n_kv];
        for (token, cell) in t.cells.iter().enumerate().filter(|(token, _)| look.blind != Some(*token)) {
            let now = self.stream.rows[*cell as usize].as_ref().unwrap().pos;
            for (row, mask) in self.stream.rows.iter().zip(&mut mask[token * n_kv..(token + 1) * n_kv]) {
                if row.as_ref().is_some_and(|r| r.pos <= now) && !(look.masked && draw.below(4) == 0) {
                    *mask = if look.masked && draw.below(5) == 0 { f16::from_f32(-0.75) } else { f16::ZERO };
                }
            }
        }
        mask
    }
}

/// Group, head sizes of keys and values.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 64, 64), (4, 64, 64), (7, 64, 32), (4, 80, 80), (7, 96, 96), (4, 128, 128), (7, 128, 128), (1, 256, 256)];

/// Steps of the decode path, and one of the prefill path.
const STEPS: [usize; 4] = [1, 3, 64, 200];

fn looks(i: usize) -> Look {
    [
        Look::default(),
        Look { masked: true, ..Look::default() },
        Look { softcap: 5.0, masked: true, ..Look::default() },
        Look { sinks: true, ..Look::default() },
        Look { softcap: 20.0, sinks: true, masked: true, blind: Some(0) },
    ][i % 5]
}

#[test]
fn attention_to_exact_rows_is_ggmls() {
    for (i, (group, d_k, d_v)) in SHAPES.into_iter().enumerate() {
        let rope = if i % 2 == 0 { plain(d_k) } else { RopeParams::none() };
        let mut s = Roped::new(group, d_k, d_v, rope, CELLS);
        s.append(1, 550);
        for (at, n) in STEPS.into_iter().enumerate() {
            s.step(10 + at as u64, n, looks(i + at)).check(0.0, &format!("group {group}, heads of {d_k} and {d_v}, {n} tokens"));
        }
        assert_eq!(s.coded(), 0);
    }
}

#[test]
fn attention_to_codes_is_ggmls_over_rebuilt_rows() {
    for (i, (group, d_k, d_v)) in SHAPES.into_iter().enumerate() {
        for (j, rope) in [RopeParams::none(), ropes(d_k)[1 + i % 6].clone()].into_iter().enumerate() {
            let mut s = Roped::new(group, d_k, d_v, rope, 16);
            s.append(2, 600);
            assert!(s.coded() > 500);
            for (at, n) in STEPS.into_iter().enumerate() {
                // What ggml sees is rounded to f16; queries, probabilities and codes times gains have 16 bits here.
                s.step(20 + at as u64, n, looks(i + 3 * j + at))
                    .check(2f64.powi(-12), &format!("group {group}, heads of {d_k} and {d_v}, {n} tokens"));
            }
        }
    }
}

#[test]
fn ropes_are_ggmls() {
    let positions = [-37, 0, 1, 100, 4095, 131_071];
    for d in [64, 80, 128] {
        let x: Vec<f32> = (0..d * positions.len()).map(|i| (i as f32 * 0.37).cos()).collect();
        for p in ropes(d) {
            let want = ggml().rope(&p, &positions, d, &x);
            let rope = Rope::new(&p, d).unwrap();
            let mut turn = Turn::default();
            for ((position, x), want) in positions.into_iter().zip(x.chunks_exact(d)).zip(want.chunks_exact(d)) {
                let mut got = x.to_vec();
                rope.turn(i64::from(position), &mut turn);
                rope.rotate(&turn, &mut got);
                assert!(got[p.n_dims..] == x[p.n_dims..] && want[p.n_dims..] == x[p.n_dims..]);
                for i in 0..p.n_dims / 2 {
                    let (a, b) = if p.pairing == Pairing::Halves { (i, i + p.n_dims / 2) } else { (2 * i, 2 * i + 1) };
                    // ggml multiplies its way from pair to pair in f32, by a factor that is itself rounded.
                    let angle = f64::from(position.abs()) * f64::from(p.freq_base).powf(-2.0 * i as f64 / p.n_dims as f64);
                    let limit = f64::from(x[a].hypot(x[b])) * (angle * (3 * i + 8) as f64 * 2f64.powi(-24) + 2f64.powi(-21));
                    let error = f64::from((got[a] - want[a]).hypot(got[b] - want[b]));
                    assert!(error <= limit, "{p:?}: pair {i} at {position} is off by {error}, {limit} allowed");
                }
            }
        }
    }
}

#[test]
fn keys_of_rows_that_move_are_those_that_ggml_ropes_again() {
    // Rows come in f16: what ggml ropes was rounded once more where rows are codes.
    for (window, limit) in [(CELLS, 2f64.powi(-11)), (16, 2f64.powi(-10))] {
        for rope in ropes(64) {
            let mut s = Roped::new(4, 64, 64, rope, window);
            s.append(3, 700);
            let (before, _) = s.stream.rebuild(0);
            let gone = s.stream.cells_of(0)[150..190].to_vec();
            s.stream.remove(0, &gone);
            let mut moves = vec![0; CELLS as usize];
            for cell in s.stream.cells_of(0) {
                let row = s.stream.rows[cell as usize].as_mut().unwrap();
                if row.pos >= 190 {
                    row.pos -= 40;
                    moves[cell as usize] = -40;
                }
            }
            let (after, _) = s.stream.rebuild(0);
            let before: Vec<f32> = before.iter().map(|x| x.to_f32()).collect();
            let want = ggml().rope(&s.rope, &moves, 64, &before);
            let row = KV_HEADS * 64;
            for cell in s.stream.live() {
                for at in (cell as usize * row..(cell as usize + 1) * row).step_by(64) {
                    let error = rel_rms(widen(&after[at..at + 64]), want[at..at + 64].iter().map(|x| f64::from(*x)));
                    assert!(error < limit, "{:?}: cell {cell}, moved by {}, is off by {error}", s.rope, moves[cell as usize]);
                }
            }
        }
    }
}

#[test]
fn codes_find_what_keys_have_in_common_behind_ggmls_rope() {
    let error = |rope: &RopeParams, told: &RopeParams| {
        let mut s = Roped::new(4, 64, 64, told.clone(), 16);
        s.rope = rope.clone();
        let keys = s.append(4, 800);
        let (rebuilt, _) = s.stream.rebuild(0);
        let want = ggml().rope(rope, &(0..800).collect::<Vec<_>>(), 64, &keys);
        rel_rms(widen(&rebuilt[..want.len()]), want.into_iter().map(f64::from))
    };
    for rope in &ropes(64)[1..] {
        let other = RopeParams { pairing: rope.pairing, freq_base: 300_000.0, ..plain(64) };
        let (right, none, other) = (error(rope, rope), error(rope, &RopeParams::none()), error(rope, &other));
        println!("{right}, {none} when told of no rope, {other} of another one: {rope:?}");
        // A rope of some elements makes as much of a difference as there are of them.
        let most = 1.0 - 0.07 * rope.n_dims as f64 / 64.0;
        assert!(right < most * none && right < 0.98 * other, "{right} against {none} and {other}: {rope:?}");
    }
}
