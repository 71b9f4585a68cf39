//! Divergence against bytes held: settings that differ in size only are points of a curve, and curves are compared where they
//! are equally large.
//!
//! Must not know what the settings are.

use serde::Serialize;

/// A setting as a point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Its name.
    pub setting: String,
    /// Bytes that it holds.
    pub bytes: f64,
    /// Its mean KL divergence.
    pub kl: f64,
}

/// Settings that differ in size only, from small to large.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Curve {
    /// Their common name.
    pub family: String,
    /// The settings.
    pub points: Vec<Point>,
}

/// A setting beside another curve.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beside {
    /// The setting.
    pub point: Point,
    /// The other curve.
    pub family: String,
    /// What the other curve has at these bytes; none where it does not reach.
    pub kl: Option<f64>,
    /// The bytes that the other curve needs for this divergence; none where it does not reach.
    pub bytes: Option<f64>,
}

/// Makes curves of points, each with its family, in the order in which families come.
pub fn curves(points: impl Iterator<Item = (String, Point)>) -> Vec<Curve> {
    let mut curves: Vec<Curve> = vec![];
    for (family, point) in points {
        match curves.iter_mut().find(|c| c.family == family) {
            Some(c) => c.points.push(point),
            None => curves.push(Curve { family, points: vec![point] }),
        }
    }
    curves.iter_mut().for_each(|c| c.points.sort_by(|a, b| a.bytes.total_cmp(&b.bytes)));
    curves
}

/// All points of other curves beside those whose family begins with `ours` and that have points enough for a line.
pub fn beside(curves: &[Curve], ours: &str) -> Vec<Beside> {
    let (own, others): (Vec<&Curve>, Vec<&Curve>) = curves.iter().partition(|c| c.family.starts_with(ours));
    let pairs = own.into_iter().filter(|c| c.points.len() > 1).flat_map(|c| others.iter().flat_map(|o| &o.points).map(move |p| (c, p)));
    let compare = |(c, p): (&Curve, &Point)| {
        let along = |x: &dyn Fn(&Point) -> f64, y: &dyn Fn(&Point) -> f64, at| {
            let line: Vec<(f64, f64)> = c.points.iter().map(|p| (x(p), y(p))).collect();
            between(&line, at)
        };
        Beside {
            point: p.clone(),
            family: c.family.clone(),
            kl: along(&|p| p.bytes, &|p| p.kl, p.bytes),
            bytes: along(&|p| p.kl, &|p| p.bytes, p.kl),
        }
    };
    pairs.map(compare).collect()
}

/// The value at `x` of straight lines through points on logarithmic axes, within the points' range.
fn between(line: &[(f64, f64)], x: f64) -> Option<f64> {
    line.windows(2).find_map(|w| {
        let (low, high) = if w[0].0 <= w[1].0 { (w[0], w[1]) } else { (w[1], w[0]) };
        if !(low.0..=high.0).contains(&x) || low.0 <= 0.0 || low.1 <= 0.0 || high.1 <= 0.0 {
            return None;
        }
        let share = if high.0 == low.0 { 0.0 } else { (x / low.0).ln() / (high.0 / low.0).ln() };
        Some((low.1.ln() + share * (high.1 / low.1).ln()).exp())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_between_two_of_another_curve() {
        let point = |setting: &str, bytes, kl| Point { setting: setting.into(), bytes, kl };
        let all = [
            ("ours".to_string(), point("ours-4", 40.0, 0.001)),
            ("ours".to_string(), point("ours-8", 10.0, 0.1)),
            ("q".to_string(), point("q8", 80.0, 0.0001)),
            ("q".to_string(), point("q4", 20.0, 0.05)),
        ];
        let curves = curves(all.into_iter());
        assert_eq!(curves.iter().map(|c| c.points[0].setting.as_str()).collect::<Vec<_>>(), ["ours-8", "q4"]);
        let beside = beside(&curves, "ours");
        assert_eq!(beside.len(), 2);
        // Half way from 10 to 40 on a logarithmic axis, and so half way from 0.1 to 0.001.
        assert_eq!((beside[0].point.setting.as_str(), beside[1].kl, beside[1].bytes), ("q4", None, None));
        assert!((beside[0].kl.unwrap() - 0.01).abs() < 1e-12, "{:?}", beside[0]);
        // 4 times smaller with 100 times the divergence: twice the divergence, 2^(-ln 4 / ln 100) times as large.
        let bytes = 10.0 * 2f64.powf(4f64.ln() / 100f64.ln());
        assert!((beside[0].bytes.unwrap() - bytes).abs() < 1e-9, "{:?}", beside[0]);
        assert!(super::beside(&curves[..1], "q").is_empty());
    }
}
