//! The law: which layers, heads and sides of a cache a KL divergence comes from.
//!
//! `KL ~ sum over layers of E |e|^2 / |x|^2`: e is what the codes of one layer change in the output of its attention where it
//! joins the residual stream, x that stream with it, as the next norm reads it. (Without it the first layer of some models counts
//! a hundred or thousands of times too much: their embeddings are short beside what their first attention adds.) The law needs no logits, and it
//! adds up: over layers, over heads, and over keys and values. Its constant is the model's and the text's, so it says where a
//! divergence comes from better than how large it is.
//!
//! Owns the way from an error of a head to its term. Must not know how errors are found or terms are shown.

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use super::probe::{BranchStep, Context, LayerInfo, Probe, Side, Tensor};

/// What lies between the heads of a layer and the residual stream.
struct Branch {
    /// `[output][input]`.
    projection: Vec<f32>,
    width: usize,
    steps: Vec<Step>,
}

enum Step {
    Add(Vec<f32>),
    Mul(Vec<f32>),
    Scale { by: f32, plus: f32 },
    Norm { eps: f32, is_centred: bool },
}

/// The residual stream behind the attention of a layer, at one token.
#[derive(Clone, Debug, PartialEq)]
struct Stream {
    /// |x|^2.
    power: f64,
    /// What a norm behind the projection reads; empty where there is none.
    projected: Vec<f32>,
}

/// The terms of a layer, at one token or on average.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Of all its errors together.
    pub whole: f64,
    /// Of the keys of each KV head.
    pub keys: Vec<f64>,
    /// Of the values of each KV head.
    pub values: Vec<f64>,
}

impl Branch {
    /// Asks the graph of a stock context.
    fn read(probe: &mut Probe, context: &Context, layer: usize) -> Result<Self> {
        let width = probe.info().layers.get(layer).map_or(0, |l| l.n_head * l.d_v);
        let projection = probe.captured(context, layer, Tensor::Output)?;
        let (steps, numbers) = probe.branch(context, layer)?;
        let mut numbers = numbers.into_iter();
        let mut vector = |n: usize| numbers.by_ref().take(n).collect::<Vec<_>>();
        let steps = steps.into_iter().map(|s| match s {
            BranchStep::Add { n } => Step::Add(vector(n)),
            BranchStep::Mul { n } => Step::Mul(vector(n)),
            BranchStep::Scale { by, plus } => Step::Scale { by, plus },
            BranchStep::RmsNorm { eps } => Step::Norm { eps, is_centred: false },
            BranchStep::Norm { eps } => Step::Norm { eps, is_centred: true },
        });
        Self::new(projection, width, steps.collect())
    }

    fn new(projection: Vec<f32>, width: usize, steps: Vec<Step>) -> Result<Self> {
        ensure!(width > 0 && projection.len().is_multiple_of(width), "an output projection of {} numbers for {width} inputs", projection.len());
        let outputs = projection.len() / width;
        let fits = |s: &Step| !matches!(s, Step::Add(v) | Step::Mul(v) if v.len() != outputs && v.len() != 1);
        ensure!(steps.iter().all(fits), "a vector behind the output projection has another length than its {outputs} outputs");
        Ok(Self { projection, width, steps })
    }

    fn is_linear(&self) -> bool {
        !self.steps.iter().any(|s| matches!(s, Step::Norm { .. }))
    }

    /// What inputs from `first` on become.
    fn project(&self, first: usize, x: &[f32]) -> Vec<f32> {
        self.projection.chunks_exact(self.width).map(|row| dot(&row[first..first + x.len()], x)).collect()
    }

    /// The stream at a token, from the outputs of all heads and the sum that they go into.
    fn stream(&self, attention: &[f32], joined: &[f32]) -> Result<Stream> {
        let outputs = self.projection.len() / self.width;
        ensure!(attention.len() == self.width && joined.len() == outputs, "{outputs} outputs go into a sum of {}", joined.len());
        let projected = if self.is_linear() { vec![] } else { self.project(0, attention) };
        Ok(Stream { power: joined.iter().map(|x| f64::from(*x).powi(2)).sum(), projected })
    }

    /// The terms of a token. `errors` has those of all heads, first whole ones, then the part of the values; what is left is that of
    /// the keys.
    fn terms(&self, stream: &Stream, n_head_kv: usize, errors: &[f32]) -> Result<Terms> {
        ensure!(errors.len() == 2 * self.width && n_head_kv > 0, "{} numbers for the errors of {} outputs", errors.len(), self.width);
        let (whole, values) = errors.split_at(self.width);
        let keys: Vec<f32> = whole.iter().zip(values).map(|(w, v)| w - v).collect();
        let group = self.width / n_head_kv;
        let each = |side: &[f32]| -> Vec<Vec<f32>> { side.chunks_exact(group).enumerate().map(|(h, e)| self.project(h * group, e)).collect() };
        let (mut keys, mut values) = (each(&keys), each(values));
        let mut whole = sum(keys.iter().chain(&values));
        let mut y = stream.projected.clone();
        for step in &self.steps {
            keys.iter_mut().chain(&mut values).chain([&mut whole]).for_each(|e| step.slope(&y, e));
            step.apply(&mut y);
        }
        let term = |e: &Vec<f32>| e.iter().map(|e| f64::from(*e).powi(2)).sum::<f64>() / stream.power.max(f64::MIN_POSITIVE);
        Ok(Terms { whole: term(&whole), keys: keys.iter().map(term).collect(), values: values.iter().map(term).collect() })
    }
}

impl Step {
    /// What becomes of a value; nothing of an empty one.
    fn apply(&self, y: &mut [f32]) {
        match self {
            Step::Add(v) => y.iter_mut().zip(v.iter().cycle()).for_each(|(y, v)| *y += v),
            Step::Mul(v) => y.iter_mut().zip(v.iter().cycle()).for_each(|(y, v)| *y *= v),
            Step::Scale { by, plus } => y.iter_mut().for_each(|y| *y = *y * by + plus),
            Step::Norm { eps, is_centred } => {
                let (mean, root) = moments(y, *eps, *is_centred);
                y.iter_mut().for_each(|y| *y = ((f64::from(*y) - mean) / root) as f32);
            }
        }
    }

    /// What becomes of a small change of `y`.
    fn slope(&self, y: &[f32], change: &mut [f32]) {
        match self {
            Step::Add(_) => {}
            Step::Mul(v) => change.iter_mut().zip(v.iter().cycle()).for_each(|(e, v)| *e *= v),
            Step::Scale { by, .. } => change.iter_mut().for_each(|e| *e *= by),
            Step::Norm { eps, is_centred } => {
                let (mean, root) = moments(y, *eps, *is_centred);
                let n = y.len() as f64;
                let shift = if *is_centred { change.iter().map(|e| f64::from(*e)).sum::<f64>() / n } else { 0.0 };
                let along = change.iter().zip(y).map(|(e, y)| (f64::from(*e) - shift) * (f64::from(*y) - mean)).sum::<f64>() / (n * root.powi(2));
                change.iter_mut().zip(y).for_each(|(e, y)| *e = ((f64::from(*e) - shift - along * (f64::from(*y) - mean)) / root) as f32);
            }
        }
    }
}

/// Mean (0 if it stays) and root of the mean square around it.
fn moments(y: &[f32], eps: f32, is_centred: bool) -> (f64, f64) {
    let n = y.len().max(1) as f64;
    let mean = if is_centred { y.iter().map(|y| f64::from(*y)).sum::<f64>() / n } else { 0.0 };
    let square = y.iter().map(|y| (f64::from(*y) - mean).powi(2)).sum::<f64>() / n;
    (mean, (square + f64::from(eps)).sqrt())
}

fn sum<'a>(parts: impl Iterator<Item = &'a Vec<f32>>) -> Vec<f32> {
    parts.fold(vec![], |mut all, part| {
        all.resize(part.len(), 0.0);
        all.iter_mut().zip(part).for_each(|(a, p)| *a += p);
        all
    })
}

/// In eight sums, which the compiler may work on at once.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// What was seen of a layer at one token.
pub struct Token<'a> {
    /// The layer.
    pub layer: usize,
    /// The outputs of its heads in the reference.
    pub attention: &'a [f32],
    /// The sum that they go into, there.
    pub joined: &'a [f32],
    /// What the codes change in these outputs, as the probe tells it.
    pub errors: &'a [f32],
}

/// The terms of all layers, on average over their tokens; `context` is a stock one. The ways to the residual stream are read one
/// after the other: together they are a large part of a model.
pub fn by_layer(probe: &mut Probe, context: &Context, tokens: &[Token]) -> Result<Vec<Terms>> {
    let layers = probe.info().layers.clone();
    let of_layer = |(l, info): (usize, &LayerInfo)| {
        if info.n_head == 0 {
            return Ok(Terms::default());
        }
        let branch = Branch::read(probe, context, l)?;
        let terms = |t: &Token| branch.terms(&branch.stream(t.attention, t.joined)?, info.n_head_kv, t.errors);
        Ok(mean(&tokens.iter().filter(|t| t.layer == l).map(terms).collect::<Result<Vec<_>>>()?))
    };
    layers.iter().enumerate().map(of_layer).collect()
}

/// The mean over tokens; nothing of nothing.
fn mean(tokens: &[Terms]) -> Terms {
    let n = tokens.len().max(1) as f64;
    let each = |of: &dyn Fn(&Terms) -> &Vec<f64>| -> Vec<f64> {
        let heads = tokens.first().map_or(0, |t| of(t).len());
        (0..heads).map(|h| tokens.iter().map(|t| of(t)[h]).sum::<f64>() / n).collect()
    };
    Terms { whole: tokens.iter().map(|t| t.whole).sum::<f64>() / n, keys: each(&|t| &t.keys), values: each(&|t| &t.values) }
}

/// Where a divergence comes from.
#[derive(Clone, Debug, Serialize)]
pub struct Law {
    /// What the law says: the sum of all layers' terms.
    pub says: f64,
    /// The divergence that was measured, if one was.
    pub measured: Option<f64>,
    /// The terms by layer, as they are.
    pub terms: Vec<Terms>,
    /// What was measured, or else what the law says, in nats: shared out over the layers by their terms, and a layer's part over its
    /// heads and sides by theirs.
    pub shares: Vec<Terms>,
}

impl Law {
    /// Scales the terms of all layers to what was measured.
    pub fn new(terms: Vec<Terms>, measured: Option<f64>) -> Self {
        let says: f64 = terms.iter().map(|l| l.whole).sum();
        let factor = |of: f64, whole: f64| if whole > 0.0 { of / whole } else { 0.0 };
        let scale = factor(measured.unwrap_or(says), says);
        let share = |l: &Terms| {
            let part = l.whole * scale;
            let by = factor(part, l.keys.iter().chain(&l.values).sum());
            let scaled = |x: &[f64]| x.iter().map(|x| x * by).collect();
            Terms { whole: part, keys: scaled(&l.keys), values: scaled(&l.values) }
        };
        let shares = terms.iter().map(share).collect();
        Self { says, measured, terms, shares }
    }

    /// A part of the shares over all of them.
    pub fn share(&self, part: f64) -> f64 {
        part / self.measured.unwrap_or(self.says).max(f64::MIN_POSITIVE)
    }

    /// The share of all keys.
    pub fn keys(&self) -> f64 {
        self.share(self.shares.iter().flat_map(|l| &l.keys).sum())
    }

    /// The layers with the largest shares.
    pub fn layers(&self, n: usize) -> Vec<(usize, f64)> {
        largest(self.shares.iter().map(|l| self.share(l.whole)).enumerate().collect(), n)
    }

    /// The heads with the largest shares, by layer, KV head and side.
    pub fn heads(&self, n: usize) -> Vec<((usize, usize, Side), f64)> {
        let side = |l: usize, side: Side, of: &[f64]| of.iter().enumerate().map(|(h, x)| ((l, h, side), self.share(*x))).collect::<Vec<_>>();
        largest(self.shares.iter().enumerate().flat_map(|(l, t)| [side(l, Side::K, &t.keys), side(l, Side::V, &t.values)].concat()).collect(), n)
    }
}

fn largest<T>(mut parts: Vec<(T, f64)>, n: usize) -> Vec<(T, f64)> {
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    parts.truncate(n);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Vec<Step> {
        vec![
            Step::Scale { by: 0.5, plus: 0.25 },
            Step::Add(vec![0.1, -0.2, 0.3]),
            Step::Norm { eps: 1e-5, is_centred: false },
            Step::Mul(vec![2.0, 1.0, 0.5]),
            Step::Norm { eps: 1e-5, is_centred: true },
        ]
    }

    #[test]
    fn slopes_are_those_of_the_steps() {
        let y = [0.7f32, -1.1, 0.4];
        let change = [3e-3f32, 1e-3, -2e-3];
        let through = |y: [f32; 3]| {
            let mut y = y.to_vec();
            steps().iter().for_each(|s| s.apply(&mut y));
            y
        };
        let (mut at, mut slope) = (y.to_vec(), change.to_vec());
        for step in steps() {
            step.slope(&at, &mut slope);
            step.apply(&mut at);
        }
        let (up, down) = (through([0, 1, 2].map(|i| y[i] + change[i])), through([0, 1, 2].map(|i| y[i] - change[i])));
        for i in 0..3 {
            assert!(((up[i] - down[i]) / 2.0 - slope[i]).abs() < 2e-5, "{i}: {up:?} {down:?} {slope:?}");
        }
    }

    #[test]
    fn terms_by_hand() {
        // Two heads of one element, each KV head its own; outputs (a + b, a - b), doubled.
        let branch = Branch::new(vec![1.0, 1.0, 1.0, -1.0], 2, vec![Step::Scale { by: 2.0, plus: 0.0 }]).unwrap();
        let stream = branch.stream(&[1.0, 2.0], &[3.0, 4.0]).unwrap();
        assert_eq!(stream, Stream { power: 25.0, projected: vec![] });
        // Whole errors 3 and 1, of which the values have 1 and 1.
        let t = branch.terms(&stream, 2, &[3.0, 1.0, 1.0, 1.0]).unwrap();
        assert_eq!((t.keys.as_slice(), t.values.as_slice()), (&[32.0 / 25.0, 0.0][..], &[8.0 / 25.0; 2][..]));
        assert_eq!(t.whole, (64.0 + 16.0) / 25.0);
        let m = mean(&[t.clone(), Terms { whole: 0.0, keys: vec![0.0; 2], values: vec![0.0; 2] }]);
        assert_eq!((m.whole, m.keys[0]), (1.6, 0.64));
        let law = Law::new(vec![m, Terms { whole: 0.4, ..Terms::default() }], Some(0.5));
        assert_eq!((law.says, law.shares[0].whole, law.shares[1].whole), (2.0, 0.4, 0.1));
        assert!((law.shares[0].keys[0] - 0.4 * 32.0 / 48.0).abs() < 1e-12 && (law.keys() - 0.8 * 32.0 / 48.0).abs() < 1e-12);
        assert_eq!((law.layers(1), law.heads(2)[0].0, law.heads(2).len()), (vec![(0, 0.8)], (0, 0, Side::K), 2));
        assert!(branch.terms(&stream, 2, &[0.0; 3]).is_err() && branch.stream(&[1.0, 2.0], &[0.0]).is_err());
    }
}
