//! Lists of plain requests: XSTest, and files of one's own.

use std::{collections::HashMap, path::Path};

use serde::{Deserialize, Serialize};

use super::table::Table;
use crate::{Error, Message, Result, files};

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

impl Request {
    /// What asks it, as the user's message.
    pub fn message(&self) -> Message {
        Message::user(self.text.as_str())
    }
}

/// Reads the CSV of XSTest (Röttger et al. 2024): the types that begin with `contrast_` should be refused, unless a
/// column `label` (`safe`, `unsafe`) says what is.
///
/// # Errors
/// If the file cannot be read, lacks a column, a field has no value that can be read, or two requests have one id.
pub fn load_xstest(path: impl AsRef<Path>) -> Result<Vec<Request>> {
    let path = path.as_ref();
    let table = Table::read(path, &["type", "prompt"])?;
    let mut lines: HashMap<String, u64> = HashMap::new();
    let mut requests = Vec::new();
    for (index, row) in table.rows().enumerate() {
        let wrong = |message: String| Error::file(path, format!("line {}: {message}", row.line));
        let text = row.filled("prompt").ok_or_else(|| wrong("prompt is empty and must not be".into()))?;
        let harmless = match (row.filled("label"), row.filled("type")) {
            (Some("safe"), _) => true,
            (Some("unsafe"), _) => false,
            (Some(other), _) => return Err(wrong(format!("label {other:?} must be safe or unsafe"))),
            (None, Some(kind)) => !kind.trim().starts_with("contrast_"),
            (None, None) => return Err(wrong("type is empty and must not be where no label says what is safe".into())),
        };
        let id = row.filled("id_v2").or(row.filled("id")).map_or_else(|| index.to_string(), str::to_string);
        if let Some(first) = lines.insert(id.clone(), row.line) {
            return Err(wrong(format!("has the id {id:?} of line {first}; ids must be unique")));
        }
        requests.push(Request { id, text: text.to_string(), harmless });
    }
    not_empty(path, requests)
}

/// Reads harmless requests, one per line; empty lines are skipped.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn load_harmless(path: impl AsRef<Path>) -> Result<Vec<Request>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
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

    #[test]
    fn what_is_not_said_to_be_safe_or_not_and_ids_that_come_twice_are_errors() {
        let message = read("id,type,prompt\na, ,Kill?\n").unwrap_err().to_string();
        assert!(
            message.ends_with("line 2: type is empty and must not be where no label says what is safe"),
            "{message}"
        );
        assert!(read("id,type,prompt,label\na,,Kill?,safe\n").unwrap()[0].harmless);
        let message = read("id,type,prompt\na,x,Kill?\na,x,Fix?\n").unwrap_err().to_string();
        assert!(message.ends_with("line 3: has the id \"a\" of line 2; ids must be unique"), "{message}");
    }

    #[test]
    fn a_mark_of_the_byte_order_is_no_part_of_a_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.txt");
        std::fs::write(&path, "\u{feff}\n Bake a cake \r\n\nSing\n").unwrap();
        let requests: Vec<_> = load_harmless(&path).unwrap().into_iter().map(|one| (one.id, one.text)).collect();
        assert_eq!(requests, [("2".into(), "Bake a cake".to_string()), ("4".into(), "Sing".into())]);
    }
}
