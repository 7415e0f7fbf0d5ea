//! What happened while data was read: counts that belong into a log and a report.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many ids or places a [`Note`] keeps.
const KEPT: usize = 10;

/// Something that happened to rows of a data set, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// A fixed name, such as `empty_target`.
    pub name: String,
    /// What happened, in words, to be read behind the count.
    pub what: String,
    /// To how many rows.
    pub count: usize,
    /// The ids or places of the first ten.
    pub first: Vec<String>,
}

/// How many rows there are now, and what happened to the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Rows that came out.
    pub rows: usize,
    /// What happened, in order of first occurrence.
    pub notes: Vec<Note>,
}

impl LoadReport {
    /// How often something happened: the count of the note of that name, or 0.
    pub fn count(&self, name: &str) -> usize {
        self.notes.iter().find(|note| note.name == name).map_or(0, |note| note.count)
    }

    /// Counts one more row under a name. `what` is taken from the first call.
    pub(crate) fn add(&mut self, name: &str, what: &str, id: impl Into<String>) {
        let index = self.notes.iter().position(|note| note.name == name).unwrap_or_else(|| {
            self.notes.push(Note { name: name.to_string(), what: what.to_string(), count: 0, first: Vec::new() });
            self.notes.len() - 1
        });
        let note = &mut self.notes[index];
        note.count += 1;
        if note.first.len() < KEPT {
            note.first.push(id.into());
        }
    }

    /// Adds the notes of a later stage, whose rows are the ones that count.
    #[must_use]
    pub fn then(mut self, later: LoadReport) -> LoadReport {
        self.rows = later.rows;
        self.notes.extend(later.notes);
        self
    }

    /// Sends every note to the log as a warning.
    pub(crate) fn warn(&self, source: &str) {
        for note in &self.notes {
            tracing::warn!(source, name = note.name, count = note.count, "{note}");
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}", self.count, self.what, self.first.join(", "))?;
        f.write_str(if self.count > self.first.len() { ", …)" } else { ")" })
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows", self.rows)?;
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_count_and_keep_the_first() {
        let mut report = LoadReport { rows: 3, ..LoadReport::default() };
        (0..12).for_each(|index| report.add("empty_target", "empty targets skipped", format!("a/{index}")));
        report.add("refusal_missing", "behaviours without a safe response", "b");
        assert_eq!((report.count("empty_target"), report.count("other")), (12, 0));
        let text = report.to_string();
        assert!(text.starts_with("3 rows; 12 empty targets skipped (a/0, a/1,"), "{text}");
        assert!(text.ends_with("a/9, …); 1 behaviours without a safe response (b)"), "{text}");
        let later = LoadReport { rows: 2, ..LoadReport::default() };
        assert_eq!(report.clone().then(later).rows, 2);
    }
}
