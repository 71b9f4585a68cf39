//! The results as text for a terminal.
//!
//! Must not compute anything but units.

use std::fmt::Write;

use super::summary::{Entry, PathResults, Row, Summary};

/// Columns of equal width, the first to the left and the others to the right.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |i: usize| rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(i, c)| if i == 0 { format!("{c:<w$}", w = width(0)) } else { format!("{c:>w$}", w = width(i)) });
        let _ = writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    out
}

/// Three digits that count, whatever the size.
pub fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 0.0001 => {
            let digits = (2 - a.log10().floor() as i32).max(0) as usize;
            format!("{x:.digits$}")
        }
        _ => format!("{x:.1e}"),
    }
}

/// A share as per cent.
pub fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

/// Something that may be missing.
pub fn or_dash(x: Option<String>) -> String {
    x.unwrap_or_else(|| "-".into())
}

/// Headings of [`cells`].
pub const HEAD: [&str; 14] =
    ["setting", "MiB", "of f16", "bits", "KL mean", "2nd half", "99 %", "99.9 %", "same top-1", "NLL", "needles", "greedy", "own words", "switch"];

/// One line of the table.
pub fn cells(entry: &Entry, row: &Row) -> Vec<String> {
    let t = &row.text;
    let greedy = &row.greedy;
    let first = greedy.first_divergence.map_or(String::new(), |f| format!(", first at {f}"));
    vec![
        format!("{}{}", entry.name, if entry.origin == "simulated" { " (simulated)" } else { "" }),
        format!("{:.1}", entry.bytes / f64::from(1 << 20)),
        format!("1/{:.1}", entry.ratio),
        format!("{:.2}", entry.code_bits),
        number(t.kl_mean),
        number(t.kl_mean_late),
        number(t.kl_99),
        number(t.kl_999),
        percent(t.same_top1),
        format!("{:+.4}", t.nll_difference),
        or_dash(row.needles.as_ref().map(|n| percent(n.found))),
        format!("{}/{}{first}", greedy.agreeing, greedy.tokens),
        number(row.continuation.kl_mean),
        or_dash(row.switch.as_ref().map(|s| format!("{}{}", number(s.switched.kl_mean), s.ratio.map_or(String::new(), |r| format!(" ({r:.2}x)"))))),
    ]
}

fn path(s: &Summary, p: &PathResults) -> String {
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    rows.extend(s.settings.iter().zip(&p.rows).map(|(e, r)| cells(e, r)));
    let o = &s.options;
    format!(
        "\n{} path, {} texts of {} tokens in a context of {}, KL divergence to f16 in nats\n\n{}",
        p.path,
        o.texts,
        o.length,
        o.ctx,
        columns(&rows)
    )
}

/// All paths.
pub fn all(s: &Summary) -> String {
    // Rates of a spectral cache fall with age, measured by the size of its context.
    let short = s.options.length * 2 < s.options.ctx as usize;
    let note = "\nTexts are much shorter than the context: spectral settings keep most of their rows at the finer rates of young rows\n(-flat: one rate for rows of all ages).\n";
    s.paths.iter().map(|p| path(s, p)).collect::<String>() + if short { note } else { "" } + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        let shown = [0.0, 1234.5, 12.345, 0.99999, 0.012345, 0.00012345, 0.0000012345, -0.5].map(number);
        assert_eq!(shown, ["0", "1234", "12.3", "1.000", "0.0123", "0.000123", "1.2e-6", "-0.500"]);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["a", "bb", "c"], ["long", "1", "22"]].map(|r| r.map(String::from).to_vec());
        assert_eq!(columns(&rows), "a     bb   c\nlong   1  22\n");
    }
}
