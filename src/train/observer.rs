//! Those who watch a run: log files and the progress bar.

use std::{
    fs::{self, File, OpenOptions},
    io::{IsTerminal, Write, stderr},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Serialize, de::DeserializeOwned};

use super::metrics::UpdateMetrics;
use crate::{CausalLm, Error, Result, files};

/// Sees the metrics of every update, and the model after it.
pub trait Observer: Send {
    /// After an update.
    ///
    /// # Errors
    /// Whatever the implementation meets; the run stops with it.
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()>;

    /// After that, with the model as the update left it, for measurements on the way. Measuring changes nothing in the run
    /// that follows.
    ///
    /// # Errors
    /// Whatever the implementation meets; the run stops with it.
    fn inspect(&mut self, _metrics: &UpdateMetrics, _model: &dyn CausalLm) -> Result<()> {
        Ok(())
    }

    /// Once, when the run is over or stopped.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

impl<O: Observer + ?Sized> Observer for Box<O> {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        (**self).update(metrics)
    }
    fn inspect(&mut self, metrics: &UpdateMetrics, model: &dyn CausalLm) -> Result<()> {
        (**self).inspect(metrics, model)
    }
    fn finish(&mut self) -> Result<()> {
        (**self).finish()
    }
}

/// A file of one JSON object a line: of every update's metrics, or of what else a run measures on its way.
#[derive(Debug)]
pub struct JsonLines<T = UpdateMetrics> {
    path: PathBuf,
    file: File,
    lines: PhantomData<fn(&T)>,
}

impl<T: Serialize + DeserializeOwned> JsonLines<T> {
    /// Opens a file to append to, with those of its lines that are to be kept: a run that goes on drops what its checkpoint
    /// does not know.
    ///
    /// # Errors
    /// If the file cannot be read or written, or a line is no `T` that a crash did not cut off: the message names the line.
    pub fn open(path: impl Into<PathBuf>, keep: impl Fn(&T) -> bool) -> Result<Self> {
        let path = path.into();
        let mut kept = Vec::new();
        if path.exists() {
            for (line, value) in whole_lines(&path, &read_bytes(&path)?)? {
                if keep(&value) {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
        }
        files::write(&path, &kept)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file, lines: PhantomData })
    }

    /// Reads a file that a run wrote or is writing: a last line that is cut off is left out.
    ///
    /// # Errors
    /// If the file cannot be read, or a whole line is no `T`: the message names the line.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<T>> {
        let path = path.as_ref();
        Ok(whole_lines(path, &read_bytes(path)?)?.into_iter().map(|(_, value)| value).collect())
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn add(&mut self, value: &T) -> Result<()> {
        let mut line = serde_json::to_string(value).map_err(|error| Error::file(&self.path, error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|error| Error::io(&self.path, error))
    }
}

/// As bytes, since a line may have been cut off inside a character.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Error::io(path, error))
}

/// The lines of a file and what they say, without the last if a crash cut it off.
fn whole_lines<'a, T: DeserializeOwned>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(&'a [u8], T)>> {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    let mut whole = Vec::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(value) => whole.push((line, value)),
            // A line is written with its end: one that has it was not cut off.
            Err(_) if index + 1 == lines => {
                tracing::warn!(path = %path.display(), line = index + 1, "the last line is cut off and left out");
            }
            Err(error) => return Err(Error::file(path, format!("line {}: {error}", index + 1))),
        }
    }
    Ok(whole)
}

impl Observer for JsonLines {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        self.add(metrics)
    }
}

/// A progress bar on standard error, if that is a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    begun: bool,
}

impl Progress {
    /// A bar for a run; shows nothing where standard error is not a terminal.
    pub fn new() -> Self {
        let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} updates, {eta} left  {msg}") {
            bar.set_style(style);
        }
        Self { bar, begun: false }
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
        if !self.begun {
            // The updates before a resumed run's first took no time here: they must not enter the estimate.
            self.bar.set_position((metrics.update as u64).saturating_sub(1));
            self.bar.reset_eta();
            self.begun = true;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, updates: usize) -> Result<JsonLines> {
        JsonLines::open(path, |metrics: &UpdateMetrics| metrics.update <= updates)
    }

    fn file_of(updates: &[usize]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = open(&path, 0).unwrap();
        for update in updates {
            lines.update(&UpdateMetrics { update: *update, ..Default::default() }).unwrap();
        }
        (folder, path)
    }

    fn updates(path: &Path) -> Vec<usize> {
        JsonLines::read(path).unwrap().iter().map(|metrics: &UpdateMetrics| metrics.update).collect()
    }

    #[test]
    fn a_resumed_run_drops_what_its_checkpoint_does_not_know() {
        let (_folder, path) = file_of(&[1, 2, 3]);
        let mut lines = open(&path, 2).unwrap();
        lines.update(&UpdateMetrics { update: 3, loss: f64::NAN, ..Default::default() }).unwrap();
        open(&path, 3).unwrap();
        assert_eq!(updates(&path), [1, 2, 3]);
        assert!(JsonLines::<UpdateMetrics>::read(&path).unwrap()[2].loss.is_nan());
    }

    #[test]
    fn a_last_line_that_is_cut_off_is_left_out_and_another_is_an_error() {
        let (_folder, path) = file_of(&[1, 2]);
        let whole = fs::read(&path).unwrap();
        // Cut inside a character of two bytes.
        fs::write(&path, [whole.as_slice(), b"{\"terms\":{\"\xc3"].concat()).unwrap();
        assert_eq!(updates(&path), [1, 2]);
        open(&path, 2).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        for wrong in [[b"{\n", whole.as_slice()].concat(), b"{\"loss\":1}\n".to_vec()] {
            fs::write(&path, &wrong).unwrap();
            assert!(open(&path, 2).unwrap_err().to_string().contains("line 1"));
            assert_eq!(fs::read(&path).unwrap(), wrong, "what is not understood stays");
        }
    }
}
