//! Those who watch a run: log files and the progress bar.

use std::{
    fs::{File, OpenOptions},
    io::{IsTerminal, Write, stderr},
    path::{Path, PathBuf},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::metrics::UpdateMetrics;
use crate::{Error, Result, files};

/// Sees the metrics of every update.
pub trait Observer: Send {
    /// After an update.
    ///
    /// # Errors
    /// Whatever the implementation meets; the run stops with it.
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()>;

    /// Once, when the run is over or stopped.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Writes one JSON object per update and line.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens a file to append to, keeping the lines of its first `keep` updates: 0 for a new run, the checkpoint's update
    /// for one that goes on.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: impl Into<PathBuf>, keep: usize) -> Result<Self> {
        let path = path.into();
        let kept: String = match path.exists() {
            true => files::read_text(&path)?
                .lines()
                .filter(|line| is_kept(line, keep))
                .map(|line| format!("{line}\n"))
                .collect(),
            false => String::new(),
        };
        files::write(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file })
    }

    /// Reads the metrics of a file that a run wrote.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is not an update's metrics: the message names the line.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<UpdateMetrics>> {
        let path = path.as_ref();
        let text = files::read_text(path)?;
        let parse = |(index, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| Error::file(path, format!("line {}: {error}", index + 1)))
        };
        text.lines().enumerate().map(parse).collect()
    }
}

/// Whether a line is whole and of an update up to `keep`.
fn is_kept(line: &str, keep: usize) -> bool {
    serde_json::from_str::<UpdateMetrics>(line).is_ok_and(|metrics| metrics.update <= keep)
}

impl Observer for JsonLines {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics).map_err(|error| Error::file(&self.path, error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|error| Error::io(&self.path, error))
    }
}

/// A progress bar on standard error, if that is a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for a run; shows nothing where standard error is not a terminal.
    pub fn new() -> Self {
        let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} updates, {eta} left  {msg}") {
            bar.set_style(style);
        }
        Self { bar }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Observer for Progress {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        self.bar.set_length(metrics.updates_total as u64);
        let attack = (metrics.attack.as_ref()).map_or(String::new(), |attack| {
            format!("  attack {:.3} -> {:.3}", attack.objective_first, attack.objective_last)
        });
        self.bar.set_message(format!("loss {:.4}{attack}", metrics.loss));
        self.bar.set_position(metrics.update as u64);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.bar.finish_and_clear();
        Ok(())
    }
}
