//! CSV files with named columns.

use std::{collections::HashMap, path::Path};

use csv::StringRecord;

use crate::{Error, Result};

/// A CSV file, read whole.
#[derive(Debug)]
pub(crate) struct Table {
    columns: HashMap<String, usize>,
    rows: Vec<(u64, StringRecord)>,
}

/// One row of a [`Table`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    table: &'a Table,
    /// Line in the file, from 1.
    pub(crate) line: u64,
    record: &'a StringRecord,
}

impl Table {
    /// Reads a file whose first row names its columns.
    ///
    /// # Errors
    /// If the file cannot be read, is not CSV, or lacks a needed column.
    pub(crate) fn read(path: &Path, needed: &[&str]) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(|source| Error::io(path, source))?;
        let mut reader = csv::Reader::from_reader(file);
        let broken = |error: csv::Error| Error::file(path, format!("not CSV: {error}"));
        let headers = reader.headers().map_err(broken)?.clone();
        if let Some(missing) = needed.iter().find(|needed| !headers.iter().any(|name| name == **needed)) {
            let found = headers.iter().collect::<Vec<_>>().join(", ");
            return Err(Error::file(path, format!("has no column {missing}; found {found}")));
        }
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(broken)?;
            rows.push((record.position().map_or(0, csv::Position::line), record));
        }
        let columns = headers.iter().enumerate().map(|(index, name)| (name.to_string(), index)).collect();
        Ok(Self { columns, rows })
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|(line, record)| Row { table: self, line: *line, record })
    }
}

impl<'a> Row<'a> {
    /// The text of a column; empty where the file has no such column.
    pub(crate) fn text(&self, column: &str) -> &'a str {
        self.table.columns.get(column).and_then(|index| self.record.get(*index)).unwrap_or_default()
    }

    /// The text of a column, if there is more than white space in it.
    pub(crate) fn filled(&self, column: &str) -> Option<&'a str> {
        Some(self.text(column)).filter(|text| !text.trim().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, needed: &[&str]) -> Result<Table> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        std::fs::write(&path, text).unwrap();
        Table::read(&path, needed)
    }

    #[test]
    fn rows_know_their_lines() {
        let table = read("\u{feff}a,b\n\"1\n2\",x\n3, \n", &["a"]).unwrap();
        let rows: Vec<_> = table.rows().map(|row| (row.line, row.text("a"), row.filled("b"), row.text("c"))).collect();
        assert_eq!(rows, [(2, "1\n2", Some("x"), ""), (4, "3", None, "")]);
    }

    #[test]
    fn a_missing_column_and_a_short_row_are_errors() {
        let message = read("a,b\n", &["a", "c"]).unwrap_err().to_string();
        assert!(message.ends_with("x.csv: has no column c; found a, b"), "{message}");
        let message = read("a,b\n1,2\n3\n", &[]).unwrap_err().to_string();
        assert!(message.contains("line: 3"), "{message}");
    }
}
