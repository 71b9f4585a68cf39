//! What changes in the rows of a head do to the residual stream, over the queries of a sample.
//!
//! `KL(next token) ~ sum over layers of E |e|^2 / |x|^2`, where `e` is the error that attention adds to the residual stream, behind the output
//! projection, and `x` that stream with attention in it: in the first layer of some models it is little else. Such errors add up over heads, keys
//! and values, so each is measured by itself. Must not know how rows are coded.

use super::fit::{HeadRows, Place, Sample};
use crate::layout::{Heads, TILE};
use crate::simd::{Kernels, MatMut, MatRef};

/// Query tokens of one product.
const TOKENS: usize = 16;
/// Most rows of the output projection. Of more, sums with random signs are made: squares of these are off by `sqrt(2 / OUTPUTS)`, 4 %, which no share
/// of bits would tell from none, and without them the projection would take more time than all else together.
const OUTPUTS: usize = 1024;

/// How a token sees a row.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    Not,
    /// In its window, or a sink.
    Exact,
    Coded,
}

/// Rows of keys as products want them: 64 together, each coordinate's together.
fn panels(kernels: &Kernels, rows: &[f32], d: usize) -> Vec<Vec<f32>> {
    let panel = |rows: &[f32]| {
        let n = rows.len() / d;
        let mut columns = vec![0.0; n * d];
        (kernels.transpose)(MatRef::new(rows, d), MatMut::new(&mut columns, n), n, d);
        columns
    };
    rows.chunks(TILE * d).map(panel).collect()
}

/// `out[q][row] = queries[q] . key[row]`.
fn scores(kernels: &Kernels, queries: &[f32], keys: &[Vec<f32>], d: usize, out: &mut [f32], n: usize) {
    out.fill(0.0);
    for (i, panel) in keys.iter().enumerate() {
        let m = panel.len() / d;
        let out = MatMut::new(&mut out[i * TILE..], n);
        (kernels.multiply)(MatRef::new(queries, d), MatRef::new(panel, m), out, queries.len() / d, d, m);
    }
}

/// Queries in the second half of the rows: before it, few rows are old enough to be coded. All of them, if none is there.
fn later(s: &Sample) -> Vec<usize> {
    let mut positions: Vec<i32> = s.rows.iter().map(|r| r.pos).collect();
    positions.sort_unstable();
    let half = positions.get(positions.len() / 2).copied().unwrap_or(0);
    let some: Vec<usize> = (0..s.queries.len()).filter(|i| s.queries[*i].pos >= half).collect();
    if some.is_empty() {
        (0..s.queries.len()).collect()
    } else {
        some
    }
}

fn seen(s: &Sample, query: &Place, row: &Place) -> Seen {
    match row {
        _ if row.seq != query.seq || row.pos > query.pos => Seen::Not,
        _ if row.pos < s.sinks || i64::from(query.pos) - i64::from(row.pos) < i64::from(s.window) => Seen::Exact,
        _ => Seen::Coded,
    }
}

/// Raw products to probabilities, hidden rows to zero.
fn softmax(kernels: &Kernels, s: &Sample, seen: &[Seen], x: &mut [f32]) {
    for (x, seen) in x.iter_mut().zip(seen) {
        *x = if *seen == Seen::Not { f32::NEG_INFINITY } else { *x * s.scale };
    }
    if s.softcap > 0.0 {
        x.iter_mut().filter(|x| x.is_finite()).for_each(|x| *x = s.softcap * (*x / s.softcap).tanh());
    }
    let largest = (kernels.largest)(x);
    if largest > f32::NEG_INFINITY {
        let sum = (kernels.exp_sum)(x, largest);
        x.iter_mut().for_each(|x| *x /= sum);
    } else {
        x.fill(0.0);
    }
}

/// `out[q] = sum_row p[q][row] * rows[row]`.
fn weigh(kernels: &Kernels, p: &[f32], n: usize, rows: &[f32], d: usize, out: &mut [f32]) {
    out.fill(0.0);
    for (i, rows) in rows.chunks(TILE * d).enumerate() {
        let (m, queries) = (rows.len() / d, out.len() / d);
        (kernels.multiply)(MatRef::new(&p[i * TILE..], n), MatRef::new(rows, d), MatMut::new(out, d), queries, m, d);
    }
}

fn squares(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// MurmurHash3's last steps: random enough, and the same every time.
fn hash(i: u32) -> u32 {
    let i = (i ^ i >> 16).wrapping_mul(0x85eb_ca6b);
    let i = (i ^ i >> 13).wrapping_mul(0xc2b2_ae35);
    i ^ i >> 16
}

/// The columns of the output projection that read a head's group, at most [`OUTPUTS`] rows of them; nothing for identity.
fn projection(g: &Heads, s: &Sample, head: usize) -> Vec<f32> {
    let (n, width) = (g.group() * g.d_v, g.n_head * g.d_v);
    let rows = s.projection.chunks_exact(width).map(|row| &row[head * n..(head + 1) * n]);
    let mut out = vec![0.0; rows.len().min(OUTPUTS) * n];
    for (i, row) in rows.enumerate() {
        let sign = if i < OUTPUTS || hash(i as u32) >> 31 == 0 { 1.0 } else { -1.0 };
        out[i % OUTPUTS * n..][..n].iter_mut().zip(row).for_each(|(out, x)| *out += sign * x);
    }
    out
}

/// `|W x|^2` of each token's outputs `x` of a group of `n` elements in all.
fn projected(kernels: &Kernels, projection: &[f32], outputs: &[f32], n: usize, work: &mut Vec<f32>) -> Vec<f64> {
    if projection.is_empty() {
        return outputs.chunks_exact(n).map(squares).collect();
    }
    let (tokens, m) = (outputs.len() / n, projection.len() / n);
    work.resize(tokens * m, 0.0);
    (kernels.dots)(MatRef::new(outputs, n), MatRef::new(projection, n), MatMut::new(work, m), tokens, n, m);
    work.chunks_exact(m).take(tokens).map(squares).collect()
}

/// What a head does to the residual stream, and what changes of its rows do; see [`measure`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// `E[|e|^2 / |x|^2]` for what changes of the keys alone, and of the values alone, make of the head's output.
    pub errors: [f64; 2],
    /// The same for the output itself.
    pub output: f64,
}

/// What changes of the keys and of the values of KV head `head` do, each by itself: rows in a query's window and sinks do not change.
pub fn measure(kernels: &Kernels, g: &Heads, s: &Sample, head: usize, own: &HeadRows, change_k: &[f32], change_v: &[f32]) -> Measured {
    let (n, group, chosen) = (s.rows.len(), g.group(), later(s));
    if n == 0 || chosen.is_empty() {
        return Measured::default();
    }
    let (keys, changes) = (panels(kernels, &own.k, g.d_k), panels(kernels, &change_k[..n * g.d_k], g.d_k));
    let most = TOKENS * group;
    let (mut p, mut changed) = (vec![0.0; most * n], vec![0.0; most * n]);
    let (mut queries, mut outputs, mut work) = (Vec::new(), vec![0.0; most * g.d_v], Vec::new());
    let (mut states, projection) = (vec![Seen::Not; TOKENS * n], projection(g, s, head));
    let mut sums = [0.0f64; 3];
    for tokens in chosen.chunks(TOKENS) {
        queries.clear();
        tokens.iter().for_each(|t| queries.extend_from_slice(&own.q[t * group * g.d_k..][..group * g.d_k]));
        let outputs = &mut outputs[..tokens.len() * group * g.d_v];
        let mut add = |sum: &mut f64, p: &[f32], rows: &[f32]| {
            weigh(kernels, p, n, &rows[..n * g.d_v], g.d_v, outputs);
            for (token, power) in tokens.iter().zip(projected(kernels, &projection, outputs, group * g.d_v, &mut work)) {
                *sum += power / s.residual.power(*token);
            }
        };
        for (token, states) in tokens.iter().zip(states.chunks_exact_mut(n)) {
            states.iter_mut().zip(s.rows).for_each(|(state, row)| *state = seen(s, &s.queries[*token], row));
        }
        scores(kernels, &queries, &keys, g.d_k, &mut p, n);
        scores(kernels, &queries, &changes, g.d_k, &mut changed, n);
        let rows = p.chunks_exact_mut(n).zip(changed.chunks_exact_mut(n)).take(tokens.len() * group);
        for (i, (p, changed)) in rows.enumerate() {
            let states = &states[i / group * n..][..n];
            for ((changed, p), seen) in changed.iter_mut().zip(&*p).zip(states) {
                *changed = if *seen == Seen::Coded { p + *changed } else { *p };
            }
            softmax(kernels, s, states, p);
            softmax(kernels, s, states, changed);
            changed.iter_mut().zip(&*p).for_each(|(changed, p)| *changed -= p);
        }
        add(&mut sums[0], &changed, &own.v);
        add(&mut sums[2], &p, &own.v);
        for (i, p) in p.chunks_exact_mut(n).enumerate().take(tokens.len() * group) {
            p.iter_mut().zip(&states[i / group * n..]).filter(|(_, seen)| **seen != Seen::Coded).for_each(|(p, _)| *p = 0.0);
        }
        add(&mut sums[1], &p, change_v);
    }
    let [k, v, output] = sums.map(|sum| sum / chosen.len() as f64);
    Measured { errors: [k, v], output }
}

#[cfg(test)]
mod tests {
    use super::super::fit::Residual;
    use super::*;
    use crate::config::LayerShape;
    use crate::simd::kernels;

    #[test]
    fn large_projections_are_folded_and_give_about_the_same() {
        let g = Heads::of(&LayerShape { n_head: 4, n_head_kv: 2, d_k: 2, d_v: 16 });
        let noise = |n: u32, seed: u32| -> Vec<f32> { (0..n).map(|i| hash(hash(i).wrapping_add(seed)) as f32 / u32::MAX as f32 - 0.5).collect() };
        let (whole, outputs) = (noise(5000 * 64, 3), noise(20 * 32, 8));
        let s = Sample {
            rows: &[],
            turns: &[],
            queries: &[],
            residual: Residual::Unknown,
            projection: &whole,
            scale: 1.0,
            softcap: 0.0,
            window: 0,
            sinks: 0,
            n_cells: 0,
            bits: 2.0,
        };
        let own = projection(&g, &s, 1);
        assert_eq!(own.len(), OUTPUTS * 32);
        let got: f64 = projected(kernels(), &own, &outputs, 32, &mut vec![]).iter().sum();
        let product = |w: &[f32], x: &[f32]| w[32..].iter().zip(x).map(|(w, x)| f64::from(w * x)).sum::<f64>();
        let want: f64 = outputs.chunks_exact(32).flat_map(|x| whole.chunks_exact(64).map(move |w| product(w, x).powi(2))).sum();
        assert!((got / want - 1.0).abs() < 0.15, "{got} {want}");
    }
}
