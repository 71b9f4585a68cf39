//! The results as tables, for a terminal and for the page.
//!
//! Owns their words. Must not compute anything but units.

use super::summary::{Entry, PathResults, Recall, Row, Summary, BINS};
use crate::text::{columns, number, or_dash, percent};

/// A table; each row begins with the origin of its setting.
pub struct Grid {
    /// What it shows.
    pub title: &'static str,
    /// How it is to be read.
    pub words: &'static str,
    /// Names of the columns.
    pub head: Vec<String>,
    /// The rows.
    pub rows: Vec<(&'static str, Vec<String>)>,
}

const MIB: f64 = (1 << 20) as f64;

fn words(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

/// One row for each setting, without columns that nothing was measured for.
fn of_settings(
    s: &Summary,
    p: &PathResults,
    title: &'static str,
    text: &'static str,
    head: Vec<String>,
    cells: &dyn Fn(&Entry, &Row) -> Vec<String>,
) -> Grid {
    let mut rows: Vec<(&'static str, Vec<String>)> = s.settings.iter().zip(&p.rows).map(|(e, r)| (e.origin, cells(e, r))).collect();
    let has: Vec<bool> = (0..head.len()).map(|i| rows.iter().any(|(_, cells)| cells[i] != "-")).collect();
    let keep = |cells: Vec<String>| cells.into_iter().zip(&has).filter(|(_, has)| **has).map(|(c, _)| c).collect();
    rows.iter_mut().for_each(|(_, cells)| *cells = keep(std::mem::take(cells)));
    Grid { title, words: text, head: keep(head), rows }
}

/// The main table.
pub fn main(s: &Summary, p: &PathResults) -> Grid {
    let head = words(&[
        "setting",
        "MiB",
        "of f16",
        "bits",
        "KL mean",
        "2nd half",
        "99 %",
        "99.9 %",
        "same top-1",
        "NLL",
        "needles",
        "functions",
        "greedy",
        "own words",
        "switch",
    ]);
    of_settings(s, p, "Settings", "", head, &|entry, row| {
        let text = |of: &dyn Fn(&super::summary::Divergence) -> String| or_dash(row.text.as_ref().map(of));
        let found = |r: &Option<Recall>| or_dash(r.as_ref().map(|r| percent(r.found)));
        vec![
            format!("{}{}", entry.name, if entry.origin == "simulated" { " (simulated)" } else { "" }),
            format!("{:.1}", entry.bytes / MIB),
            format!("1/{:.1}", entry.ratio),
            format!("{:.2}", entry.code_bits),
            text(&|t| number(t.kl_mean)),
            text(&|t| number(t.kl_mean_late)),
            text(&|t| number(t.kl_99)),
            text(&|t| number(t.kl_999)),
            text(&|t| percent(t.same_top1)),
            text(&|t| format!("{:+.4}", t.nll_difference)),
            found(&row.needles),
            found(&row.functions),
            or_dash(row.greedy.as_ref().map(|g| {
                let first = g.first_divergence.map_or(String::new(), |f| format!(", first at {f}"));
                format!("{}/{}{first}", g.agreeing, g.tokens)
            })),
            or_dash(row.continuation.as_ref().map(|d| number(d.kl_mean))),
            or_dash(row.switch.as_ref().map(|s| times(s.switched.kl_mean, s.ratio))),
        ]
    })
}

/// A number, and how many times another one it is.
fn times(x: f64, ratio: Option<f64>) -> String {
    format!("{}{}", number(x), ratio.map_or(String::new(), |r| format!(" ({r:.2}x)")))
}

/// Other settings beside curves of spectral ones.
pub fn equal_bytes(s: &Summary, p: &PathResults) -> Grid {
    let origin = |setting: &str| s.settings.iter().find(|e| e.name == setting).map_or("", |e| e.origin);
    let row = |b: &super::curve::Beside| {
        let cells = vec![
            b.point.setting.clone(),
            format!("{:.1}", b.point.bytes / MIB),
            number(b.point.kl),
            b.family.clone(),
            or_dash(b.kl.map(number)),
            or_dash(b.kl.map(|kl| if kl > 0.0 { format!("1/{}", number(b.point.kl / kl)) } else { "0".into() })),
            or_dash(b.bytes.map(|x| format!("{:.1}", x / MIB))),
        ];
        (origin(&b.point.setting), cells)
    };
    Grid {
        title: "At equal bytes",
        words: "Mean KL divergence of spectral settings at the bytes that another one holds, and the bytes that they need for its divergence: on \
                straight lines between the measured settings, both axes logarithmic.",
        head: words(&["setting", "MiB", "KL mean", "beside", "KL there", "to its own", "MiB for its KL"]),
        rows: p.equal_bytes.iter().map(row).collect(),
    }
}

fn by_depth(r: Option<&Recall>) -> Vec<String> {
    let cells = |r: &Recall| {
        let right = |share: f64| format!("{:.0}/{}", share * r.asked as f64, r.asked);
        let shares = r.by_depth.iter().map(|d| or_dash(d.map(percent)));
        [right(r.found), or_dash(r.found_of_f16.map(percent))].into_iter().chain(shares).collect()
    };
    r.map_or_else(|| vec!["-".into(); BINS + 2], cells)
}

fn depths(what: &str) -> Vec<String> {
    let bins = (1..=BINS).map(|b| format!("{b}/{BINS}"));
    ["setting", what, "of f16's"].map(String::from).into_iter().chain(bins).collect()
}

/// Planted facts by depth.
pub fn needles(s: &Summary, p: &PathResults) -> Grid {
    let text = "Facts whose whole code is given back: all, of those that f16 gives back, and by depth from the beginning of the text to its end.";
    of_settings(s, p, "Planted facts", text, depths("found"), &|e, r| [vec![e.name.clone()], by_depth(r.needles.as_ref())].concat())
}

/// Near duplicates by depth.
pub fn functions(s: &Summary, p: &PathResults) -> Grid {
    let text = "Functions of one line whose number comes back by greedy decoding right behind the code: all, of those that f16 knows, and by depth \
                from the beginning of the code to its end.";
    of_settings(s, p, "Near duplicates", text, depths("right"), &|e, r| [vec![e.name.clone()], by_depth(r.functions.as_ref())].concat())
}

/// Texts behind beginnings that say nothing.
pub fn beginnings(s: &Summary, p: &PathResults) -> Grid {
    let text = "Mean KL divergence on the second half of a text behind a beginning that says nothing, and how many times that without it.";
    let kinds = p.rows.first().map_or(vec![], |r| r.beginnings.iter().map(|b| b.kind.clone()).collect());
    let head = [words(&["setting"]), kinds].concat();
    of_settings(s, p, "Beginnings that say nothing", text, head, &|e, r| {
        let cells = r.beginnings.iter().map(|b| times(b.divergence.kl_mean, b.ratio));
        [e.name.clone()].into_iter().chain(cells).collect()
    })
}

/// Tokens taken back.
pub fn rewinds(s: &Summary, p: &PathResults) -> Grid {
    let text = "Mean KL divergence of the next 24 tokens after so many tokens were taken back, and of the first of them alone.";
    let backs = p.rows.first().map_or(vec![], |r| r.rewinds.iter().flat_map(|w| [format!("{} back", w.tokens), "first".into()]).collect());
    let head = [words(&["setting"]), backs].concat();
    of_settings(s, p, "Going back", text, head, &|e, r| {
        let cells = r.rewinds.iter().flat_map(|w| [number(w.kl_mean), number(w.kl_first)]);
        [e.name.clone()].into_iter().chain(cells).collect()
    })
}

/// The layers and heads that most of the divergence comes from.
const MOST: usize = 5;

/// Where the divergence comes from.
pub fn law(s: &Summary, p: &PathResults) -> Grid {
    let text =
        "The law: KL goes with the sum over layers of |e|^2 / |x|^2, e what the codes change in the output of a layer's attention, x the residual \
                stream behind it. Its constant is the model's and the text's: shares are of the measured divergence. A head is a KV head.";
    let head = words(&["setting", "law", "KL", "law/KL", "keys", "layers with most", "heads with most"]);
    of_settings(s, p, "Where the divergence comes from", text, head, &|e, r| {
        let Some(l) = r.law.as_ref().filter(|l| l.says > 0.0) else { return [vec![e.name.clone()], vec!["-".to_string(); 6]].concat() };
        let layers = l.layers(MOST).into_iter().map(|(layer, share)| format!("{layer}: {}", percent(share)));
        let heads = l.heads(MOST).into_iter().map(|((layer, head, side), share)| format!("{layer}.{head} {}: {}", side.name(), percent(share)));
        vec![
            e.name.clone(),
            number(l.says),
            or_dash(l.measured.map(number)),
            or_dash(l.measured.filter(|m| *m > 0.0).map(|m| number(l.says / m))),
            percent(l.keys()),
            layers.collect::<Vec<_>>().join(", "),
            heads.collect::<Vec<_>>().join(", "),
        ]
    })
}

/// All that a terminal shows of a path behind the main table.
fn more(s: &Summary, p: &PathResults) -> Vec<Grid> {
    [functions, beginnings, rewinds, law, equal_bytes].map(|g| g(s, p)).into_iter().filter(Grid::is_measured).collect()
}

impl Grid {
    /// Whether it has more than names.
    pub fn is_measured(&self) -> bool {
        self.head.len() > 1 && !self.rows.is_empty()
    }

    fn text(&self) -> String {
        columns(&[std::slice::from_ref(&self.head), &self.rows.iter().map(|(_, r)| r.clone()).collect::<Vec<_>>()].concat())
    }
}

fn path(s: &Summary, p: &PathResults) -> String {
    let o = &s.options;
    let rounding = if p.rows.iter().any(|r| r.setting == "rounding+window") {
        "\nrounding+window changes the last bit of f16 rows: a KL divergence below its own cannot be told from rounding (--weights f32 makes it small).\n"
    } else {
        ""
    };
    let more: String = more(s, p).iter().map(|g| format!("\n{}. {}\n\n{}", g.title, g.words, g.text())).collect();
    format!(
        "\n{} path, {} texts of {} tokens in a context of {}, KL divergence to f16 in nats\n\n{}{more}",
        p.path,
        o.texts,
        o.length,
        o.ctx,
        main(s, p).text() + rounding
    )
}

/// All paths.
pub fn all(s: &Summary) -> String {
    // Rates of a spectral cache fall with age, measured by the size of its context.
    let short = s.options.length * 2 < s.options.ctx as usize;
    let note = "\nTexts are much shorter than the context: spectral settings keep most of their rows at the finer rates of young rows\n(-flat: one rate for rows of all ages).\n";
    s.paths.iter().map(|p| path(s, p)).collect::<String>() + if short { note } else { "" } + "\n"
}
