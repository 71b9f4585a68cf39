//! Shows how far something long is: a bar on a terminal, elsewhere a line for each tenth.
//!
//! Must not know what is done.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// How far one piece of work is. Nothing is shown before the first step.
pub struct Progress {
    what: String,
    unit: &'static str,
    small: u64,
    bar: Option<ProgressBar>,
    tenth: u64,
}

impl Progress {
    /// `unit` stands behind the numbers. Where there is no terminal, work of less than `small` steps is not told about.
    pub fn new(what: String, unit: &'static str, small: u64) -> Self {
        Self { what, unit, small, bar: None, tenth: 0 }
    }

    /// So many steps are done, and `detail` is next.
    pub fn at(&mut self, done: u64, total: u64, detail: &str) {
        if io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| {
                let template = format!("{{prefix}} {{bar:30}} {{pos}}/{{len}}{} {{elapsed}} {{wide_msg}}", self.unit);
                let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
                ProgressBar::new(total).with_style(style).with_prefix(self.what.clone())
            });
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(detail.to_string());
        } else if total >= self.small && done * 10 / total > self.tenth {
            self.tenth = done * 10 / total;
            eprintln!("{}: {done}/{total}{}", self.what, self.unit);
        }
    }

    /// The bar is taken away.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
