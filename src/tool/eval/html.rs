//! The results as one self-contained page.
//!
//! Owns its words and its markup. Must not compute anything but units.

use std::fmt::Write;

use anyhow::Result;

use super::plots::{bars, heat_map, scatter, Mark, Scale};
use super::summary::{Entry, PathResults, Row, Summary, BINS};
use super::table;
use crate::tool::text::{number, or_dash, percent};

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

fn path(s: &Summary, p: &PathResults) -> Result<String> {
    let both: Vec<(&Entry, &Row)> = s.settings.iter().zip(&p.rows).collect();
    let table = |head: &[String], cells: &dyn Fn(&Row) -> Vec<String>| {
        grid(head, both.iter().map(|(e, r)| (e.origin.to_string(), [vec![e.name.clone()], cells(r)].concat())))
    };
    let marks = |x: &dyn Fn(&Entry, &Row) -> f64, y: &dyn Fn(&Row) -> f64| -> Vec<Mark> {
        both.iter().map(|(e, r)| Mark { name: &e.name, origin: e.origin, x: x(e, r), y: y(r) }).collect()
    };
    let head = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    let numbered = |name: &str, n: usize| [vec!["setting".to_string()], (1..=n).map(|i| format!("{name} {i}")).collect()].concat();
    let mib = f64::from(1 << 20);
    let what = if p.path == "decode" {
        format!("{} token(s) at once, codes are attended to", s.options.step)
    } else {
        "512 tokens at once, rows are rebuilt".into()
    };
    let mut out = format!("<h2>{} path: {what}</h2>\n", p.path);

    out += &grid(&head(&table::HEAD), both.iter().map(|(e, r)| (e.origin.to_string(), table::cells(e, r))));
    out += "<h3>Memory against KL divergence</h3>\n<p>MiB for the whole context. f16 itself is not shown: its divergence is 0.</p>\n";
    out += &scatter(&marks(&|e, _| e.bytes / mib, &|r| r.text.kl_mean), "MiB", "mean KL divergence")?;
    out += "<p>The same on the second half of the judged positions.</p>\n";
    out += &scatter(&marks(&|e, _| e.bytes / mib, &|r| r.text.kl_mean_late), "MiB", "mean KL divergence, second half")?;
    let n = both.first().map_or(0, |(_, r)| r.text.kl_mean_by_text.len());
    let by_text = table(&numbered("text", n), &|r| r.text.kl_mean_by_text.iter().map(|x| number(*x)).collect());
    let by_position = table(&numbered("eighth", BINS), &|r| r.text.kl_mean_by_position.iter().map(|x| number(*x)).collect());
    out += &folded("Mean KL divergence by text", &by_text);
    out += &folded("Mean KL divergence by position, from the first eighth of the judged positions to the last", &by_position);

    if both.iter().any(|(_, r)| r.needles.is_some()) {
        out += "<h3>Planted facts by depth</h3>\n<p>Share of facts whose whole code is given back, from the beginning of the text to its end.</p>\n";
        let depth = |r: &Row| r.needles.as_ref().map_or_else(|| vec![None; BINS], |n| n.by_depth.clone());
        let rows: Vec<_> = both.iter().map(|(e, r)| (e.name.clone(), depth(r))).collect();
        let columns: Vec<String> = (1..=BINS).map(|b| format!("{b}/{BINS}")).collect();
        out += &heat_map(&rows, &columns, Scale::Share)?;
        let names = [head(&["setting", "asked", "found", "of those f16 finds"]), columns].concat();
        out += &table(&names, &|r| match &r.needles {
            Some(n) => {
                let shares = n.by_depth.iter().map(|d| or_dash(d.map(percent)));
                [n.asked.to_string(), percent(n.found), or_dash(n.found_of_f16.map(percent))].into_iter().chain(shares).collect()
            }
            None => vec![],
        });
    }

    out +=
        "<h3>The model's own words</h3>\n<p>Mean KL divergence on what f16 itself said, sampled at temperature 0.8, after a quarter of a text.</p>\n";
    out += &bars(&marks(&|_, r| r.continuation.kl_mean, &|_| 0.0))?;
    let divergence = |d: &super::summary::Divergence| {
        vec![number(d.kl_mean), number(d.kl_mean_late), number(d.kl_99), number(d.kl_999), percent(d.same_top1), format!("{:+.4}", d.nll_difference)]
    };
    const MEASURES: [&str; 7] = ["setting", "KL mean", "2nd half", "99 %", "99.9 %", "same top-1", "NLL"];
    out += &table(&head(&MEASURES), &|r| divergence(&r.continuation));
    out += "<h3>Greedy generation</h3>\n<p>Tokens that are f16's at the same place, and how many come before the first that is not.</p>\n";
    out += &table(&head(&["setting", "tokens", "agreeing", "before the first other"]), &|r| {
        vec![r.greedy.tokens.to_string(), r.greedy.agreeing.to_string(), or_dash(r.greedy.first_divergence.map(|f| f.to_string()))]
    });

    if both.iter().any(|(_, r)| r.switch.is_some()) {
        out += "<h3>A change of topic</h3>\n<p>The same tokens, after another text and after the text that really comes before them: mean KL divergence after \
                the other one, over that after their own.</p>\n";
        out += &bars(&marks(&|_, r| r.switch.as_ref().and_then(|s| s.ratio).unwrap_or(0.0), &|_| 0.0))?;
        out += &table(&head(&["setting", "own topic", "99.9 %", "other topic", "99.9 %", "ratio"]), &|r| match &r.switch {
            Some(s) => vec![
                number(s.same_topic.kl_mean),
                number(s.same_topic.kl_999),
                number(s.switched.kl_mean),
                number(s.switched.kl_999),
                or_dash(s.ratio.map(|r| format!("{r:.2}"))),
            ],
            None => vec![],
        });
    }

    out += "<h3>Attention outputs by layer and head</h3>\n<p>Relative error before the output projection, on some positions of the first text. \
            A layer's error contains what earlier layers pass on.</p>\n";
    for (e, r) in both.iter().filter(|(e, _)| e.name != "f16") {
        let heads = r.heads.iter().map(Vec::len).max().unwrap_or(0);
        let columns: Vec<String> = (0..heads).map(|h| format!("head {h}")).collect();
        let rows: Vec<_> = r.heads.iter().enumerate().map(|(l, errors)| (format!("layer {l}"), errors.iter().map(|x| Some(*x)).collect())).collect();
        let names = [vec![String::from("layer")], columns.clone()].concat();
        let cells = r.heads.iter().enumerate().map(|(l, errors)| {
            let errors = errors.iter().map(|x| number(*x));
            (String::new(), [l.to_string()].into_iter().chain(errors).collect())
        });
        out += &folded(&e.name, &(heat_map(&rows, &columns, Scale::Error)? + &grid(&names, cells)));
    }
    Ok(out)
}
