//! The results as text for a terminal.
//!
//! Must not compute anything but units.

use super::summary::{Entry, PathResults, Row, Summary};
use crate::tool::text::{columns, number, or_dash, percent};

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
