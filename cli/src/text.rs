//! Numbers and columns for people.
//!
//! Must not know what the numbers are.

use std::fmt::Write;

/// Columns of equal width, the first to the left and the others to the right.
pub fn columns(rows: &[Vec<String>]) -> String {
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
