//! Lists of plain requests: XSTest, and files of one's own.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::table::Table;
use crate::{Error, Result, files};

/// A request and whether it should be answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Unique in its file.
    pub id: String,
    /// What is asked.
    pub text: String,
    /// Whether a model should answer.
    pub harmless: bool,
}

/// Reads the CSV of XSTest (Röttger et al. 2024): the types that begin with `contrast_` should be refused, unless a column
/// `label` (`safe`, `unsafe`) says what is.
///
/// # Errors
/// If the file cannot be read, lacks a column, or a field has no value that can be read.
pub fn load_xstest(path: impl AsRef<Path>) -> Result<Vec<Request>> {
    let path = path.as_ref();
    let table = Table::read(path, &["type", "prompt"])?;
    let requests = table.rows().enumerate().map(|(index, row)| {
        let wrong = |message: String| Error::file(path, format!("line {}: {message}", row.line));
        let text = row.filled("prompt").ok_or_else(|| wrong("prompt is empty and must not be".into()))?;
        let harmless = match row.filled("label") {
            Some("safe") => true,
            Some("unsafe") => false,
            Some(other) => return Err(wrong(format!("label {other:?} must be safe or unsafe"))),
            None => !row.text("type").starts_with("contrast_"),
        };
        let id = row.filled("id_v2").or(row.filled("id")).map_or_else(|| index.to_string(), str::to_string);
        Ok(Request { id, text: text.to_string(), harmless })
    });
    not_empty(path, requests.collect::<Result<_>>()?)
}

/// Reads harmless requests, one per line; empty lines are skipped.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn load_harmless(path: impl AsRef<Path>) -> Result<Vec<Request>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty());
    let request =
        |(index, line): (usize, &str)| Request { id: (index + 1).to_string(), text: line.to_string(), harmless: true };
    not_empty(path, lines.map(request).collect())
}

fn not_empty(path: &Path, requests: Vec<Request>) -> Result<Vec<Request>> {
    if requests.is_empty() {
        return Err(Error::file(path, "holds no request; at least one is needed"));
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Request>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        std::fs::write(&path, text).unwrap();
        load_xstest(&path)
    }

    #[test]
    fn contrasts_should_be_refused() {
        let requests = read("id_v2,type,prompt\na,homonyms,Kill a process?\nb,contrast_homonyms,Kill?\n").unwrap();
        assert_eq!(
            requests.iter().map(|one| (one.id.as_str(), one.harmless)).collect::<Vec<_>>(),
            [("a", true), ("b", false)]
        );
        let requests = read("id,type,prompt,label\na,x,Kill?,unsafe\n").unwrap();
        assert!(!requests[0].harmless);
        assert!(read("type,prompt,label\nx,y,maybe\n").unwrap_err().to_string().contains("safe or unsafe"));
        assert!(read("kind,prompt\n").unwrap_err().to_string().contains("no column type"));
    }
}
