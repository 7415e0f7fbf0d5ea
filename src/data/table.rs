//! CSV files with named columns.

use std::{collections::HashMap, path::Path};

use csv::StringRecord;

use crate::{Error, Result, files};

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
    /// If the file cannot be read, is not CSV, lacks a needed column, has two of one name, or ends within quotes.
    pub(crate) fn read(path: &Path, needed: &[&str]) -> Result<Self> {
        // One kind of line end, as Python's text files have it.
        let text = files::read_text(path)?.replace("\r\n", "\n");
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let broken = |error: csv::Error| Error::file(path, format!("not CSV: {error}"));
        let columns = columns(path, reader.headers().map_err(broken)?, needed)?;
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(broken)?;
            rows.push((first_line(text, &record), record));
        }
        let table = Self { columns, rows };
        table.check_end(path, text)?;
        Ok(table)
    }

    /// Quotes that nothing closes take in the rest of the file, so they would be found in its last row.
    fn check_end(&self, path: &Path, text: &str) -> Result<()> {
        let Some((line, record)) = self.rows.last() else { return Ok(()) };
        if ends_within_quotes(from_record(text, record)) {
            return Err(Error::file(
                path,
                format!("line {line}: quotes are opened and never closed; they must come in pairs"),
            ));
        }
        Ok(())
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|(line, record)| Row { table: self, line: *line, record })
    }
}

/// The bytes from where the reader began to look for a record.
fn from_record<'a>(text: &'a str, record: &StringRecord) -> impl Iterator<Item = u8> + 'a {
    text.bytes().skip(record.position().map_or(0, csv::Position::byte) as usize)
}

/// Quotes count where a field begins with them; elsewhere they are text, as in Python's csv.
fn ends_within_quotes(record: impl Iterator<Item = u8>) -> bool {
    let (mut begins, mut quoted) = (true, false);
    for byte in record {
        match byte {
            // Two in a row close and open again.
            b'"' if begins || quoted => (begins, quoted) = (quoted, !quoted),
            b',' | b'\n' => begins = !quoted,
            _ => begins = false,
        }
    }
    quoted
}

/// The line on which a record begins. The reader counts the empty lines that it skips before a record to the record.
fn first_line(text: &str, record: &StringRecord) -> u64 {
    let skipped = from_record(text, record).take_while(|byte| *byte == b'\n').count() as u64;
    record.position().map_or(0, csv::Position::line) + skipped
}

/// The place of each column by its name. Columns without a name are allowed, and not found.
fn columns(path: &Path, headers: &StringRecord, needed: &[&str]) -> Result<HashMap<String, usize>> {
    let mut columns = HashMap::new();
    for (index, name) in headers.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
        if columns.insert(name.to_string(), index).is_some() {
            return Err(Error::file(path, format!("has two columns {name}; each name may stand once")));
        }
    }
    match needed.iter().find(|needed| !columns.contains_key(**needed)) {
        Some(missing) if headers.is_empty() => {
            Err(Error::file(path, format!("is empty; the first line must name its columns, {missing} among them")))
        }
        Some(missing) => {
            let found = headers.iter().collect::<Vec<_>>().join(", ");
            Err(Error::file(path, format!("has no column {missing}; found {found}")))
        }
        None => Ok(columns),
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
        let table = read("a,b\r\n\"1\r\n2\",x\r\n3,y\r\n", &["a"]).unwrap();
        let rows: Vec<_> = table.rows().map(|row| (row.line, row.text("a"))).collect();
        assert_eq!(rows, [(2, "1\n2"), (4, "3")]);
    }

    #[test]
    fn quotes_that_nothing_closes_are_errors_and_quotes_within_text_are_not() {
        for whole in ["x,A 5\" pipe", "x,\"A 5\"\" pipe\"", "\"x\",\"\"", "x,\"\"\"y\"\"\"\n\n"] {
            let table = read(&format!("a,b\n{whole}"), &["a"]).unwrap();
            assert_eq!(table.rows().map(|row| row.text("a")).collect::<Vec<_>>(), ["x"], "{whole}");
        }
        for open in ["x,\"A 5 pipe\n", "\"x", "x,\"y\"\"", "x,\"y\n\nz,\"\"\n"] {
            let message = read(&format!("a,b\n1,2\n{open}"), &["a"]).unwrap_err().to_string();
            assert!(message.contains("quotes are opened and never closed") || message.contains("not CSV"), "{message}");
        }
    }

    #[test]
    fn a_missing_column_and_a_short_row_are_errors() {
        let message = read("a,b\n", &["a", "c"]).unwrap_err().to_string();
        assert!(message.ends_with("x.csv: has no column c; found a, b"), "{message}");
        let message = read("a,b\n1,2\n3\n", &[]).unwrap_err().to_string();
        assert!(message.contains("line: 3"), "{message}");
    }
}
