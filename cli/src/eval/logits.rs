//! The reference's logits of a text, kept in a file while the settings are held against them one after the other: a vocabulary of
//! 150000 makes a gigabyte of 1700 positions.
//!
//! Must not know what the logits are for.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Rows of logits in a file that goes when they go.
pub struct Logits {
    path: PathBuf,
    writer: BufWriter<File>,
    reader: BufReader<File>,
    row: Vec<f32>,
}

impl Logits {
    /// No rows yet, of `vocabulary` numbers each; the file will be in `dir`.
    pub fn create(dir: &Path, vocabulary: usize) -> Result<Self> {
        let path = dir.join(format!("logits-{}", std::process::id()));
        let why = || format!("cannot create {}", path.display());
        let writer = BufWriter::new(File::create(&path).with_context(why)?);
        let reader = BufReader::with_capacity(1 << 20, File::open(&path).with_context(why)?);
        // Where an open file can go, an interruption leaves nothing behind.
        let _ = fs::remove_file(&path);
        Ok(Self { path, writer, reader, row: vec![0.0; vocabulary] })
    }

    /// Adds a row.
    pub fn push(&mut self, row: &[f32]) -> Result<()> {
        self.writer.write_all(bytemuck::cast_slice(row)).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// The next row will be the first again.
    pub fn rewind(&mut self) -> Result<()> {
        self.writer.flush().with_context(|| format!("cannot write {}", self.path.display()))?;
        self.reader.rewind().with_context(|| format!("cannot read {}", self.path.display()))
    }

    /// The row after the one before.
    pub fn next_row(&mut self) -> Result<&[f32]> {
        self.reader.read_exact(bytemuck::cast_slice_mut(&mut self.row)).with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(&self.row)
    }
}

impl Drop for Logits {
    fn drop(&mut self) {
        // What cannot be removed is in the way of nothing.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_each_time() {
        let dir = std::env::temp_dir().join(format!("spectral-kv-logits-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut logits = Logits::create(&dir, 3).unwrap();
        let rows = [[1.0f32, -2.0, 3.5], [f32::MIN, 0.0, 7.0]];
        rows.iter().for_each(|r| logits.push(r).unwrap());
        for _ in 0..2 {
            logits.rewind().unwrap();
            rows.iter().for_each(|r| assert_eq!(logits.next_row().unwrap(), r));
        }
        assert!(logits.next_row().is_err());
        drop(logits);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        fs::remove_dir(&dir).unwrap();
    }
}
