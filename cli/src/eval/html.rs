//! The results as one self-contained page.
//!
//! Owns its words and its markup. Must not compute anything but units.

use std::fmt::Write;

use anyhow::Result;

use super::summary::{Divergence, Entry, PathResults, Row, Summary, BINS};
use super::table::{self, Grid};
use crate::law::{Law, Terms};
use crate::plots::{bars, heat_map, scatter, Mark, Scale};
use crate::text::{number, or_dash, percent};

const STYLE: &str = "
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #282c34; background: #fff; max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 3rem; border-bottom: 1px solid #e0e3e8; padding-bottom: .3rem; } h3 { margin-top: 2rem; }
p, li { max-width: 75ch; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid #eceef1; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 2px solid #d4d8df; }
td.stock { color: #4a67a0; } td.simulated { color: #a9611a; } td.spectral { color: #14805c; font-weight: 600; }
details { margin: .8rem 0; } summary { cursor: pointer; } svg { max-width: 100%; height: auto; } code { background: #f4f5f7; padding: 0 .25em; }
";

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A table; each row begins with its class and its name.
fn grid(head: &[String], rows: impl Iterator<Item = (String, Vec<String>)>) -> String {
    let mut out = String::from("<div class=\"scroll\"><table><tr>");
    head.iter().for_each(|h| out += &format!("<th>{}</th>", escape(h)));
    out += "</tr>\n";
    for (class, cells) in rows {
        out += "<tr>";
        for (i, c) in cells.iter().enumerate() {
            let class = if i == 0 { format!(" class=\"{class}\"") } else { String::new() };
            out += &format!("<td{class}>{}</td>", escape(c));
        }
        out += "</tr>\n";
    }
    out + "</table></div>\n"
}

fn folded(title: &str, content: &str) -> String {
    format!("<details><summary>{}</summary>\n{content}</details>\n", escape(title))
}

/// The whole page.
pub fn page(s: &Summary) -> Result<String> {
    let mut out = String::new();
    let o = &s.options;
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>KV cache evaluation: {model}</title><style>{STYLE}</style></head><body>\n<h1>KV cache evaluation: {model}</h1>\n\
         <p>{description}. spectral-kv {version}. Caches made for {ctx} tokens; {texts} texts of {length} tokens, {needles} with planted facts; \
         exact window {window}, sinks {sinks}; seed {seed}, {threads} threads.</p>\n",
        model = escape(&s.model.file),
        description = escape(&s.model.description),
        version = s.version,
        ctx = o.ctx,
        texts = o.texts,
        length = o.length,
        needles = o.needles,
        window = o.window,
        sinks = o.sinks,
        seed = o.seed,
        threads = o.threads,
    )?;
    out += "<ul><li>Every setting is compared with llama.cpp's f16 cache on the same path: the same tokens in the same ubatches. \
            KL divergence is that of the next-token distribution, in nats, on the last three quarters of each text.</li>\
            <li><b>stock</b>: llama.cpp's cache types as they ship, with its Hadamard rotation unless named <code>-norot</code>; they have no exact window. \
            <b>simulated</b>: an f16 cache whose rows are replaced by their round trip through a codec once they are behind the window; sizes are nominal, \
            the codec at its best. <b>spectral</b>: the cache itself, all bytes counted.</li>\
            <li><b>rounding+window</b> changes the last bit of each number of f16 rows. What is multiplied with quantised weights is quantised too, so \
            that the smallest change moves all that comes after it: a KL divergence below this row's cannot be told from rounding. \
            <code>--weights f32</code> makes it small.</li>\
            <li>A spectral cache keeps all rows exact until its first fit, after 1024 rows (less in a context of less than 2048), and the prototype codes \
            512 rows at once: the column <i>2nd half</i> has only the second half of the judged positions.</li>\
            <li>A spectral cache gives young rows more bits than old ones, by the size of its context: texts that are much shorter than the context \
            hardly have old rows, and are nearer to f16 than a full context is; -flat gives all rows one rate and shows what old ones have at least.</li></ul>\n";
    out += &grid(
        &["file", "tokens", "SHA-256"].map(String::from),
        [vec![s.model.file.clone(), "-".into(), s.model.sha256.clone()]]
            .into_iter()
            .chain(s.texts.iter().map(|t| vec![t.file.clone(), t.tokens.to_string(), t.sha256.clone()]))
            .map(|cells| (String::new(), cells)),
    );
    for p in &s.paths {
        out += &path(s, p)?;
    }
    Ok(out + "</body></html>\n")
}

const MIB: f64 = (1 << 20) as f64;

/// The results of one path, on their way to its sections.
struct Page<'a> {
    summary: &'a Summary,
    results: &'a PathResults,
    both: Vec<(&'a Entry, &'a Row)>,
}

fn path(s: &Summary, p: &PathResults) -> Result<String> {
    let page = Page { summary: s, results: p, both: s.settings.iter().zip(&p.rows).collect() };
    let what = if p.path == "decode" {
        format!("{} token(s) at once, codes are attended to", s.options.step)
    } else {
        "512 tokens at once, rows are rebuilt".into()
    };
    let main = table::main(s, p);
    let parts = [
        format!("<h2>{} path: {what}</h2>\n", p.path),
        grid(&main.head, main.rows.into_iter().map(|(class, cells)| (class.to_string(), cells))),
        page.memory()?,
        page.depth(table::needles(s, p), &|r| r.needles.as_ref().map(|n| &n.by_depth[..]))?,
        page.depth(table::functions(s, p), &|r| r.functions.as_ref().map(|n| &n.by_depth[..]))?,
        page.own_words()?,
        page.greedy(),
        page.switch()?,
        section(table::beginnings(s, p)),
        section(table::rewinds(s, p)),
        page.law()?,
        page.heads()?,
    ];
    Ok(parts.concat())
}

/// A table with its heading; nothing where nothing was measured.
fn section(g: Grid) -> String {
    if !g.is_measured() {
        return String::new();
    }
    let rows = g.rows.into_iter().map(|(class, cells)| (class.to_string(), cells));
    format!("<h3>{}</h3>\n<p>{}</p>\n{}", g.title, escape(g.words), grid(&g.head, rows))
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

fn numbered(name: &str, n: usize) -> Vec<String> {
    [vec!["setting".to_string()], (1..=n).map(|i| format!("{name} {i}")).collect()].concat()
}

fn numbers(x: &[f64]) -> Vec<String> {
    x.iter().map(|x| number(*x)).collect()
}

impl Page<'_> {
    /// A table of the settings that have what it shows.
    fn table<T>(&self, head: &[String], of: impl Fn(&Row) -> Option<T>, cells: impl Fn(T) -> Vec<String>) -> String {
        let rows = self.both.iter().filter_map(|(e, r)| Some((e.origin.to_string(), [vec![e.name.clone()], cells(of(r)?)].concat())));
        grid(head, rows)
    }

    fn marks(&self, x: &dyn Fn(&Entry, &Row) -> f64, y: &dyn Fn(&Row) -> f64) -> Vec<Mark<'_>> {
        let mark = |(e, r): &(&'_ Entry, &'_ Row)| (x(e, r), y(r));
        self.both
            .iter()
            .map(|b| (b, mark(b)))
            .map(|(b, (x, y))| Mark { name: &b.0.name, origin: b.0.origin, family: b.0.family.as_deref(), x, y })
            .collect()
    }

    fn bars(&self, of: &dyn Fn(&Row) -> f64) -> Result<String> {
        bars(&self.marks(&|_, r| of(r), &|_| 0.0))
    }

    fn is_measured(&self, of: impl Fn(&Row) -> bool) -> bool {
        self.both.iter().any(|(_, r)| of(r))
    }

    fn memory(&self) -> Result<String> {
        if !self.is_measured(|r| r.text.is_some()) {
            return Ok(String::new());
        }
        let kl = |of: fn(&Divergence) -> f64| move |r: &Row| r.text.as_ref().map_or(0.0, of);
        let text = |r: &Row| r.text.as_ref().map(|t| (t.kl_mean_by_text.clone(), t.kl_mean_by_position.clone()));
        let n = self.both.first().and_then(|(_, r)| text(r)).map_or(0, |(by_text, _)| by_text.len());
        let parts = [
            "<h3>Memory against KL divergence</h3>\n<p>MiB for the whole context; lines join settings that differ in their size only. f16 itself is not \
             shown: its divergence is 0.</p>\n"
                .into(),
            scatter(&self.marks(&|e, _| e.bytes / MIB, &kl(|t| t.kl_mean)), "MiB", "mean KL divergence")?,
            "<p>The same on the second half of the judged positions.</p>\n".into(),
            scatter(&self.marks(&|e, _| e.bytes / MIB, &kl(|t| t.kl_mean_late)), "MiB", "mean KL divergence, second half")?,
            section(table::equal_bytes(self.summary, self.results)),
            folded("Mean KL divergence by text", &self.table(&numbered("text", n), text, |(by_text, _)| numbers(&by_text))),
            folded(
                "Mean KL divergence by position, from the first eighth of the judged positions to the last",
                &self.table(&numbered("eighth", BINS), text, |(_, by_position)| numbers(&by_position)),
            ),
        ];
        Ok(parts.concat())
    }

    /// Shares by depth.
    fn depth(&self, g: Grid, of: &dyn Fn(&Row) -> Option<&[Option<f64>]>) -> Result<String> {
        if !self.is_measured(|r| of(r).is_some()) {
            return Ok(String::new());
        }
        let rows: Vec<_> = self.both.iter().filter_map(|(e, r)| Some((e.name.clone(), of(r)?.to_vec()))).collect();
        let columns: Vec<String> = (1..=BINS).map(|b| format!("{b}/{BINS}")).collect();
        Ok(section(g) + &heat_map(&rows, &columns, Scale::Share)?)
    }

    fn own_words(&self) -> Result<String> {
        if !self.is_measured(|r| r.continuation.is_some()) {
            return Ok(String::new());
        }
        let head = names(&["setting", "KL mean", "2nd half", "99 %", "99.9 %", "same top-1", "NLL"]);
        let cells = |d: &Divergence| {
            let kl = numbers(&[d.kl_mean, d.kl_mean_late, d.kl_99, d.kl_999]);
            [kl, vec![percent(d.same_top1), format!("{:+.4}", d.nll_difference)]].concat()
        };
        let words =
            "<h3>The model's own words</h3>\n<p>Mean KL divergence on what f16 itself said, sampled at temperature 0.8, after a quarter of a text.</p>\n";
        let bars = self.bars(&|r| r.continuation.as_ref().map_or(0.0, |d| d.kl_mean))?;
        let rows =
            self.both.iter().filter_map(|(e, r)| Some((e.origin.to_string(), [vec![e.name.clone()], cells(r.continuation.as_ref()?)].concat())));
        Ok(words.to_string() + &bars + &grid(&head, rows))
    }

    fn greedy(&self) -> String {
        if !self.is_measured(|r| r.greedy.is_some()) {
            return String::new();
        }
        let of = |r: &Row| r.greedy.as_ref().map(|g| (g.tokens, g.agreeing, g.first_divergence));
        let cells = |(tokens, agreeing, first): (usize, usize, Option<usize>)| {
            vec![tokens.to_string(), agreeing.to_string(), or_dash(first.map(|f| f.to_string()))]
        };
        "<h3>Greedy generation</h3>\n<p>Tokens that are f16's at the same place, and how many come before the first that is not.</p>\n".to_string()
            + &self.table(&names(&["setting", "tokens", "agreeing", "before the first other"]), of, cells)
    }

    fn switch(&self) -> Result<String> {
        if !self.is_measured(|r| r.switch.is_some()) {
            return Ok(String::new());
        }
        let head = names(&["setting", "own topic", "99.9 %", "other topic", "99.9 %", "ratio"]);
        let of = |r: &Row| {
            let s = r.switch.as_ref()?;
            let kl = numbers(&[s.same_topic.kl_mean, s.same_topic.kl_999, s.switched.kl_mean, s.switched.kl_999]);
            Some([kl, vec![or_dash(s.ratio.map(|r| format!("{r:.2}")))]].concat())
        };
        let words = "<h3>A change of topic</h3>\n<p>The same tokens, after another text and after the text that really comes before them: mean KL \
                     divergence after the other one, over that after their own.</p>\n";
        let bars = self.bars(&|r| r.switch.as_ref().and_then(|s| s.ratio).unwrap_or(0.0))?;
        Ok(words.to_string() + &bars + &self.table(&head, of, |cells| cells))
    }

    fn law(&self) -> Result<String> {
        let mut out = section(table::law(self.summary, self.results));
        for (e, law) in self.both.iter().filter_map(|(e, r)| Some((e, r.law.as_ref().filter(|l| l.says > 0.0)?))) {
            out += &folded(&format!("{}: by layer, head and side, of all", e.name), &shares(law)?);
        }
        Ok(out)
    }

    fn heads(&self) -> Result<String> {
        if !self.is_measured(|r| r.heads.is_some()) {
            return Ok(String::new());
        }
        let mut out =
            "<h3>Attention outputs by layer and head</h3>\n<p>Relative error before the output projection, on some positions of the first text. \
                       A layer's error contains what earlier layers pass on.</p>\n"
                .to_string();
        for (e, heads) in self.both.iter().filter(|(e, _)| e.name != "f16").filter_map(|(e, r)| Some((e, r.heads.as_ref()?))) {
            out += &folded(&e.name, &by_layer(heads, |h| format!("head {h}"), Scale::Error)?);
        }
        Ok(out)
    }
}

/// Shares of the divergence: the layer's, then those of its keys and its values, head by head.
fn shares(l: &Law) -> Result<String> {
    let n = l.shares.iter().map(|t| t.keys.len()).max().unwrap_or(0);
    let of_layer = |t: &Terms| [&[t.whole][..], &t.keys, &t.values].concat().iter().map(|x| l.share(*x)).collect();
    let name = |i: usize| match i {
        0 => "layer".to_string(),
        i if i <= n => format!("K {}", i - 1),
        i => format!("V {}", i - 1 - n),
    };
    by_layer(&l.shares.iter().map(of_layer).collect::<Vec<_>>(), name, Scale::Part)
}

/// A picture and the numbers in it.
fn by_layer(layers: &[Vec<f64>], name: impl Fn(usize) -> String, scale: Scale) -> Result<String> {
    let n = layers.iter().map(Vec::len).max().unwrap_or(0);
    let columns: Vec<String> = (0..n).map(name).collect();
    let rows: Vec<_> = layers.iter().enumerate().map(|(l, x)| (format!("layer {l}"), x.iter().map(|x| Some(*x)).collect())).collect();
    let head = [vec![String::from("layer")], columns.clone()].concat();
    let cells = layers.iter().enumerate().map(|(l, x)| (String::new(), [vec![l.to_string()], numbers(x)].concat()));
    Ok(heat_map(&rows, &columns, scale)? + &grid(&head, cells))
}
