//! Files with one JSON object per line, read line by line.

use std::{
    fs::File,
    io::{BufRead, BufReader, Lines},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use crate::{Error, Result};

/// The objects of a JSONL file with their line numbers from 1. Empty lines are skipped.
#[derive(Debug)]
pub(crate) struct JsonObjects<T> {
    path: PathBuf,
    /// None once reading has failed.
    lines: Option<Lines<BufReader<File>>>,
    line: u64,
    form: &'static str,
    item: PhantomData<fn() -> T>,
}

/// A row's id as data sets write it: a text, or a whole number that is read as text.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "an id: a text or a whole number")]
pub(crate) enum Id {
    Text(String),
    Positive(u64),
    Negative(i64),
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        match id {
            Id::Text(text) => text,
            Id::Positive(number) => number.to_string(),
            Id::Negative(number) => number.to_string(),
        }
    }
}

impl<T: DeserializeOwned> JsonObjects<T> {
    /// Opens a file; `form` is what a line should look like, for errors.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub(crate) fn open(path: &Path, form: &'static str) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let lines = BufReader::new(file).lines();
        Ok(Self { path: path.to_path_buf(), lines: Some(lines), line: 0, form, item: PhantomData })
    }

    /// An error about one line.
    pub(crate) fn error(&self, line: u64, message: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("line {line}: {message}"))
    }

    /// The file and line, for later errors about a row.
    pub(crate) fn place(&self, line: u64) -> String {
        format!("{} line {line}", self.path.display())
    }

    /// The id of a row, or `file stem:line` for one that has none of its own.
    pub(crate) fn id(&self, own: Option<Id>, line: u64) -> String {
        let stem = self.path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
        own.map(String::from).filter(|id| !id.trim().is_empty()).unwrap_or_else(|| format!("{stem}:{line}"))
    }

    fn parse(&self, text: &str) -> Result<(u64, T)> {
        let wrong = |message: String| self.error(self.line, format!("{message}; expected {}", self.form));
        // A list would be taken for the fields of an object in their order.
        if !text.trim_start().starts_with('{') {
            return Err(wrong("does not begin with {: every line must be a JSON object".to_string()));
        }
        let item = serde_json::from_str(text).map_err(|error| wrong(in_line(&error)))?;
        Ok((self.line, item))
    }
}

impl<T: DeserializeOwned> Iterator for JsonObjects<T> {
    /// A line's number and object. Nothing comes behind an error of reading.
    type Item = Result<(u64, T)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let text = self.lines.as_mut()?.next()?;
            self.line += 1;
            let text = match text {
                Ok(text) => text,
                Err(source) => {
                    self.lines = None;
                    return Some(Err(self.error(self.line, format!("cannot be read: {source}"))));
                }
            };
            let text = if self.line == 1 { text.strip_prefix('\u{feff}').unwrap_or(&text) } else { &text };
            if !text.trim().is_empty() {
                return Some(self.parse(text));
            }
        }
    }
}

/// The parser counts lines from the object's start, which is not what a reader looks for.
fn in_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}
