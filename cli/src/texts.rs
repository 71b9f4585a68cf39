//! Texts of several kinds, made of what this machine has: `text:KIND` stands for one wherever a text file is named.
//!
//! Owns the kinds and where each comes from. A text is the same each time, as long as its source is; a source that is missing
//! is told, and where there is a second one, which of them it was. Must not know what a text is read for.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

use super::layout::{Layout, Pin};
use super::tree::Tree;
use super::{cmd, fsutil, toolchain};

const PREFIX: &str = "text:";

/// Modules of the Python library that have been in it for long, are written in Python, and are long enough to read.
const MODULES: [&str; 40] = [
    "argparse",
    "ast",
    "bisect",
    "calendar",
    "cmd",
    "codecs",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "enum",
    "fnmatch",
    "fractions",
    "functools",
    "glob",
    "heapq",
    "inspect",
    "json/decoder",
    "json/encoder",
    "locale",
    "logging/handlers",
    "mimetypes",
    "os",
    "posixpath",
    "pprint",
    "random",
    "shlex",
    "shutil",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "tokenize",
    "traceback",
    "unittest/case",
    "urllib/parse",
];

/// What a text is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// English prose.
    Prose,
    /// Source code.
    Code,
    /// A conversation with an assistant that calls tools.
    Chat,
    /// Prose in another language and script.
    Chinese,
}

const KINDS: [(&str, Kind, &str); 4] = [
    ("prose", Kind::Prose, "English prose: the Rust book of the installed toolchain, or else the documentation of llama.cpp"),
    ("code", Kind::Code, "Python: modules of the library of the python3 on this machine"),
    ("chat", Kind::Chat, "a conversation with tool calls about these modules, in the format of SmolLM2 and Qwen"),
    ("chinese", Kind::Chinese, "Chinese prose: Rust by Example of the installed toolchain"),
];

/// A text and where it comes from.
pub struct Text {
    /// For people.
    pub source: String,
    /// For the name of a file.
    short: String,
    /// The text itself.
    pub body: String,
}

/// A line for each kind, to be shown to users.
pub fn list() -> String {
    KINDS.map(|(name, _, what)| format!("  {name:<8} {what}")).join("\n")
}

/// The file that a user means: `text:KIND` or `text:KIND:BYTES` is written to one, and all else is a file already.
pub fn resolve(given: &Path) -> Result<PathBuf> {
    match given.to_str().and_then(|g| g.strip_prefix(PREFIX)) {
        None => Ok(given.to_path_buf()),
        Some(named) => file(named),
    }
}

/// The file of a text, by its name without `text:`; says where the text comes from.
pub fn file(named: &str) -> Result<PathBuf> {
    let layout = Layout::find()?;
    let (name, limit) = named.split_once(':').map_or((named, None), |(name, limit)| (name, Some(limit)));
    let Some((_, kind, _)) = KINDS.into_iter().find(|(n, ..)| *n == name) else {
        bail!("there is no text `{name}`; the texts are {}", KINDS.map(|(n, ..)| n).join(", "));
    };
    let mut text = read(&layout, kind).with_context(|| format!("there is no text of the kind `{name}` here"))?;
    let mut stem = format!("{name}-{}", text.short);
    if let Some(limit) = limit {
        let bytes = limit.parse().with_context(|| format!("`{PREFIX}{named}`: expected a number of bytes behind the second colon"))?;
        ensure!(bytes <= text.body.len(), "the text `{name}` has {} bytes, fewer than {bytes}", text.body.len());
        text.body = beginning(&text.body, bytes).into();
        let _ = write!(stem, "-{bytes}");
    }
    let path = layout.work.join("texts").join(stem + ".txt");
    if !fs::read(&path).is_ok_and(|old| old == text.body.as_bytes()) {
        let why = || format!("cannot write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&path)).with_context(why)?;
        // Under a name of its own until it is complete: other runs may read it.
        let part = path.with_extension(format!("part-{}", std::process::id()));
        fs::write(&part, &text.body).and_then(|()| fs::rename(&part, &path)).with_context(why)?;
    }
    eprintln!("{PREFIX}{named} is {}, {} bytes", text.source, text.body.len());
    Ok(path)
}

/// The text of a kind.
pub fn read(layout: &Layout, kind: Kind) -> Result<Text> {
    let text = match kind {
        Kind::Prose => rust_documentation("book", "the Rust book", "rust-book")
            .or_else(|e| llama_documentation(layout).map_err(|second| e.context(format!("nor are there others: {second:#}")))),
        Kind::Chinese => rust_documentation("rust-by-example/zh", "Rust by Example in Chinese", "rust-by-example"),
        Kind::Code => Library::find()?.code(),
        Kind::Chat => Library::find()?.chat(),
    }?;
    ensure!(text.body.len() > 50_000, "{} has only {} bytes: it is not what was expected", text.source, text.body.len());
    Ok(text)
}

/// At most so many bytes of a text: whole lines, or, of a longer first line, whole characters.
pub fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    &text[..text[..end].rfind('\n').map_or(end, |i| i + 1)]
}

/// A book that is installed with Rust.
fn rust_documentation(book: &str, title: &str, short: &str) -> Result<Text> {
    let what = "it comes with Rust's documentation: `rustup component add rust-docs`";
    let root = cmd::text(Command::new("rustc").args(["--print", "sysroot"])).with_context(|| format!("{title} is not here; {what}"))?;
    let version = cmd::text(Command::new("rustc").arg("--version"))?;
    let version = version.split(' ').nth(1).unwrap_or("of an unknown version").to_string();
    let page = Path::new(&root).join("share/doc/rust/html").join(book).join("print.html");
    let html = fs::read_to_string(&page).with_context(|| format!("{title} is not in {}; {what}", page.display()))?;
    let main = html.split_once("<main>").and_then(|(_, rest)| rest.split_once("</main>"));
    let (main, _) = main.with_context(|| format!("{} has no <main>", page.display()))?;
    Ok(Text { source: format!("{title} of Rust {version}, without its code"), short: format!("{short}-{version}"), body: plain(main) })
}

/// The documentation of llama.cpp, from a tree that is built here.
fn llama_documentation(layout: &Layout) -> Result<Text> {
    let commit = Pin::read(&layout.root)?.commit;
    let tree = [Tree::Stock, Tree::Patched].map(|t| t.home(layout).join("src")).into_iter().find(|src| src.is_dir());
    let tree = tree.context("llama.cpp has not been fetched yet: `spectral-kv build` does")?;
    // Without the tables of operations.
    let skip = |rel: &Path| rel.starts_with("ops") || rel == Path::new("ops.md");
    let docs = tree.join("docs");
    let mut body = String::new();
    for rel in fsutil::files(&docs, &skip)?.iter().filter(|rel| rel.extension().is_some_and(|e| e == "md")) {
        let path = docs.join(rel);
        body += &fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    let source = format!("the documentation of llama.cpp {commit} (the Rust book is not here: `rustup component add rust-docs`)");
    Ok(Text { source, short: format!("llama.cpp-{commit}"), body })
}

/// The words of a page: a line per paragraph, without code blocks and tables.
fn plain(html: &str) -> String {
    const DROPPED: [&str; 5] = ["pre", "table", "script", "style", "svg"];
    const BLOCKS: [&str; 12] = ["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "div", "blockquote", "figcaption", "br"];
    let mut out = String::new();
    let mut rest = html;
    while let Some((text, tag)) = rest.split_once('<') {
        push_words(&mut out, text);
        let Some((tag, after)) = tag.split_once('>') else { break };
        rest = after;
        let name = tag.trim_start_matches('/').split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
        if DROPPED.contains(&tag.split(' ').next().unwrap_or_default()) {
            rest = after.split_once(&format!("</{name}>")).map_or("", |(_, after)| after);
        }
        if (BLOCKS.contains(&name) || DROPPED.contains(&name)) && !out.is_empty() && !out.ends_with('\n') {
            out.truncate(out.trim_end().len());
            out.push('\n');
        }
    }
    push_words(&mut out, rest);
    for (entity, character) in [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&#x27;", "'"), ("&amp;", "&")] {
        out = out.replace(entity, character);
    }
    out
}

/// Appends text with single spaces between words.
fn push_words(out: &mut String, text: &str) {
    for c in text.chars() {
        if !c.is_whitespace() {
            out.push(c);
        } else if !out.ends_with(char::is_whitespace) && !out.is_empty() {
            out.push(' ');
        }
    }
}

/// Modules of the library of this machine's Python, as (name, source).
struct Library {
    version: String,
    modules: Vec<(String, String)>,
}

/// A function or class of a module.
struct Definition<'a> {
    name: &'a str,
    /// Its first line, from 1.
    line: usize,
    source: String,
    /// The first paragraph of what is said about it.
    about: String,
}

impl Library {
    fn find() -> Result<Self> {
        let script = "import platform, sysconfig; print(platform.python_version()); print(sysconfig.get_path('stdlib'))";
        let said = cmd::text(Command::new(toolchain::python()?).args(["-c", script]))?;
        let (version, dir) = said.split_once('\n').with_context(|| format!("python3 does not say where its library is, but: {said}"))?;
        let module = |m: &str| Some((m.replace('/', "."), fs::read_to_string(Path::new(dir).join(m).with_extension("py")).ok()?));
        let modules: Vec<_> = MODULES.into_iter().filter_map(module).collect();
        // Versions of Python differ by a few modules, but some systems have the library in a package of its own.
        ensure!(
            modules.len() * 4 >= MODULES.len() * 3,
            "the library of Python {version} in {dir} is not complete: install all of Python (the package is called python3 or libpython3-stdlib)"
        );
        Ok(Self { version: version.into(), modules })
    }

    fn code(&self) -> Result<Text> {
        let body = self.modules.iter().map(|(_, source)| source.as_str()).collect::<Vec<_>>().join("\n\n");
        let source = format!("{} modules of the library of Python {}", self.modules.len(), self.version);
        Ok(Text { source, short: format!("python-{}", self.version), body })
    }

    fn chat(&self) -> Result<Text> {
        let mut body = String::from(SYSTEM);
        let mut asked = 0;
        for (module, source) in &self.modules {
            for d in definitions(source) {
                let _ = converse(&mut body, asked, module, source, &d);
                asked += 1;
            }
        }
        let source = format!("{asked} made-up questions about the library of Python {}, answered with tool calls", self.version);
        Ok(Text { source, short: format!("python-{}", self.version), body })
    }
}

const SYSTEM: &str = r#"<|im_start|>system
You are a helpful assistant who knows the Python library. Look things up before you answer.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "search", "description": "Search a module for a word", "parameters": {"type": "object", "properties": {"module": {"type": "string"}, "word": {"type": "string"}}, "required": ["module", "word"]}}}
{"type": "function", "function": {"name": "read_lines", "description": "Read lines of a module", "parameters": {"type": "object", "properties": {"module": {"type": "string"}, "first": {"type": "integer"}, "count": {"type": "integer"}}, "required": ["module", "first", "count"]}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"#;

/// One question: the assistant searches, reads, and answers with what the source says.
fn converse(out: &mut String, number: usize, module: &str, source: &str, d: &Definition) -> std::fmt::Result {
    let Definition { name, line, .. } = d;
    let question = match number % 4 {
        0 => format!("What does `{module}.{name}` do?"),
        1 => format!("I found {name} in a script that imports {module}. Can you tell me what it is for?"),
        2 => format!("Where is {name} defined in {module}, and what does its documentation say?"),
        _ => format!("Please explain {name} from the module {module} in one or two sentences."),
    };
    let mut say = |who: &str, text: &str| writeln!(out, "<|im_start|>{who}\n{text}<|im_end|>");
    let call = |tool: &str, arguments: Value| format!("<tool_call>\n{{\"name\": \"{tool}\", \"arguments\": {arguments}}}\n</tool_call>");
    let answer = |result| format!("<tool_response>\n{result}\n</tool_response>");
    let hits = source.lines().enumerate().filter(|(_, l)| l.contains(name)).map(|(i, l)| json!({"line": i + 1, "text": l.trim()}));
    let hits: Vec<_> = hits.take(6).collect();

    say("user", &question)?;
    say("assistant", &call("search", json!({"module": module, "word": name})))?;
    say("user", &answer(json!(hits)))?;
    say("assistant", &call("read_lines", json!({"module": module, "first": line, "count": d.source.lines().count()})))?;
    say("user", &answer(json!({"module": module, "source": d.source})))?;
    say("assistant", &format!("`{name}` is defined in line {line} of `{module}`. {}", d.about))
}

/// What a module defines at its top level, is public, and says something about itself.
fn definitions(source: &str) -> Vec<Definition<'_>> {
    const LONGEST: usize = 24;
    let lines: Vec<&str> = source.lines().collect();
    let mut found = vec![];
    for (i, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("def ").or_else(|| line.strip_prefix("class ")) else { continue };
        let name = rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
        // A signature can have several lines; the last one may begin where the first one does.
        let is_inside = |l: &&&str| l.is_empty() || l.starts_with([' ', ')']);
        let body: Vec<&str> = lines[i + 1..].iter().take_while(is_inside).take(LONGEST - 1).copied().collect();
        let Some(start) = body.iter().position(|l| l.trim_start().starts_with("\"\"\"")) else { continue };
        if name.starts_with('_') || start > 4 {
            continue;
        }
        let said = body[start..].join("\n");
        let said = said.trim_start().trim_start_matches('"').split("\"\"\"").next().unwrap_or_default();
        let about = said.split("\n\n").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
        if !about.is_empty() {
            found.push(Definition { name, line: i + 1, source: [&[*line], &body[..]].concat().join("\n").trim_end().to_string(), about });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_paragraphs() {
        let html = "<h1 id=\"a\"><a href=\"#a\">A  title</a></h1>\n<p>One\nline with <code>a &lt; b &amp;&amp; c</code>.</p>\n\
                    <pre class=\"x\"><code>no code</code></pre>\n<ul>\n<li>\n<p>point</p>\n</li></ul><preface>kept";
        assert_eq!(plain(html), "A title\nOne line with a < b && c.\npoint\nkept");
        assert_eq!(plain("&amp;lt;"), "&lt;", "decoded once");
    }

    #[test]
    fn texts_are_cut_behind_a_line() {
        assert_eq!(beginning("one\ntwo\nthree", 9), "one\ntwo\n");
        assert_eq!(beginning("one\n", 4), "one\n");
        assert_eq!(beginning("ää", 3), "ä");
    }

    #[test]
    fn definitions_have_name_place_source_and_description() {
        let source = "import os\n\ndef first(a,\n          b):\n    \"\"\"Do it\n    well.\n\n    More.\n    \"\"\"\n    return a\n\ndef _hidden():\n    \"\"\"No.\"\"\"\n\n\
                      def silent():\n    pass\n\nclass Second:\n    \"\"\"A class.\"\"\"\nx = 1\n";
        let found = definitions(source);
        assert_eq!(
            found.iter().map(|d| (d.name, d.line, d.about.as_str())).collect::<Vec<_>>(),
            [("first", 3, "Do it well."), ("Second", 18, "A class.")]
        );
        assert!(found[0].source.starts_with("def first(a,\n") && found[0].source.ends_with("return a"), "{}", found[0].source);
    }

    #[test]
    fn a_conversation_is_a_chat_with_calls() {
        let library = Library { version: "3".into(), modules: vec![("m".into(), "def f(x):\n    \"\"\"Say \"x\".\"\"\"\n    f\n".into())] };
        let chat = library.chat().unwrap().body;
        assert_eq!(chat.matches("<|im_start|>").count(), 1 + 6);
        assert_eq!(chat.matches("<|im_end|>\n").count(), 1 + 6);
        assert!(chat.contains(r#"{"name": "search", "arguments": {"module":"m","word":"f"}}"#), "{chat}");
        assert!(chat.ends_with("`f` is defined in line 1 of `m`. Say \"x\".<|im_end|>\n"), "{chat}");
    }

    #[test]
    fn an_unknown_text_is_answered_with_the_known_ones() {
        let e = resolve(Path::new("text:poem")).err().unwrap().to_string();
        assert!(KINDS.iter().all(|(name, ..)| e.contains(name)), "{e}");
        assert_eq!(resolve(Path::new("some/file.txt")).unwrap(), Path::new("some/file.txt"));
    }
}
