//! The speed of decoding against the depth, as a picture.
//!
//! Owns what is drawn and under which names. Must not know how points become a picture, nor how a speed was measured.

use anyhow::{ensure, Result};

use super::report::{Point, Subject};
use crate::plots::{scatter, Mark};

/// The curve of each cache of each model; a stock type is drawn as it was faster. An axis of depths has no place for 0.
pub fn speeds(models: &[Subject]) -> Result<String> {
    let points: Vec<_> = models.iter().flat_map(|m| m.decoded().map(move |p| (m, p))).filter(|(_, p)| p.depth > 0).collect();
    ensure!(!points.is_empty(), "no speed of decoding behind a context was measured: there is nothing to draw");
    let named = |(m, p): &(&Subject, Point)| {
        let cache = if p.is_spectral { "spectral".to_string() } else { format!("stock {}", p.cache) };
        if models.len() > 1 {
            format!("{}: {cache}", m.name())
        } else {
            cache
        }
    };
    let names: Vec<String> = points.iter().map(named).collect();
    // A curve is named at its end, and its other points by nothing.
    let is_last = |i: usize| points.iter().zip(&names).all(|((_, p), name)| *name != names[i] || p.depth <= points[i].1.depth);
    let mark = |(i, (_, p)): (usize, &(&Subject, Point))| Mark {
        name: if is_last(i) { &names[i] } else { "" },
        origin: if p.is_spectral { "spectral" } else { "stock" },
        family: Some(&names[i]),
        x: f64::from(p.depth),
        y: p.speed,
    };
    scatter(&points.iter().enumerate().map(mark).collect::<Vec<_>>(), "tokens before", "tokens/s")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::row;
    use super::*;

    #[test]
    fn a_curve_has_its_name_once_and_depth_0_is_left_out() {
        let subject = |name: &str| {
            Subject::new(name.into(), String::new(), vec![row(64, &[20.0], &[30.0]), row(512, &[10.0], &[25.0]), row(0, &[40.0], &[41.0])])
        };
        let svg = speeds(&[subject("a")]).unwrap();
        assert_eq!((svg.matches("stock f16").count(), svg.matches("spectral").count(), svg.matches("<circle").count()), (1, 1, 4));
        let svg = speeds(&[subject("a"), subject("b")]).unwrap();
        assert!(svg.contains("a: stock f16") && svg.contains("b: spectral"));
        assert!(speeds(&[Subject::new("a".into(), String::new(), vec![row(0, &[1.0], &[1.0])])]).is_err());
    }
}
