//! Questions with given answers, in the published forms of ARC and MMLU.

use std::{collections::HashMap, path::Path};

use serde::{Deserialize, Serialize};

use super::json_objects::JsonObjects;
use crate::{Error, Result, files};

/// A question with answers to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MultipleChoice {
    /// Unique in its file.
    pub id: String,
    /// What is asked.
    pub question: String,
    /// The answers, at least two.
    pub choices: Vec<String>,
    /// Which of them is right, from 0.
    pub answer: usize,
}

const FORM: &str =
    r#"{"id": text, "question": {"stem": text, "choices": [{"text": text, "label": text}, …]}, "answerKey": text}"#;

#[derive(Debug, Deserialize)]
struct ArcLine {
    id: String,
    question: ArcQuestion,
    #[serde(rename = "answerKey")]
    answer_key: String,
}

#[derive(Debug, Deserialize)]
struct ArcQuestion {
    stem: String,
    choices: Vec<ArcChoice>,
}

#[derive(Debug, Deserialize)]
struct ArcChoice {
    text: String,
    label: String,
}

/// Reads a JSONL file of ARC (Clark et al. 2018), easy or challenge.
///
/// # Errors
/// If the file cannot be read, a line has another form, none or several choices have the label of the right answer, or two
/// questions have one id.
pub fn load_arc(path: impl AsRef<Path>) -> Result<Vec<MultipleChoice>> {
    let path = path.as_ref();
    let mut lines = JsonObjects::<ArcLine>::open(path, FORM)?;
    let mut places: HashMap<String, u64> = HashMap::new();
    let mut items = Vec::new();
    while let Some(line) = lines.next() {
        let (number, ArcLine { id, question, answer_key }) = line?;
        if let Some(first) = places.insert(id.clone(), number) {
            return Err(lines.error(number, format!("has the id {id:?} of line {first}; ids must be unique")));
        }
        let labels: Vec<&str> = question.choices.iter().map(|choice| choice.label.as_str()).collect();
        let right: Vec<usize> = (0..labels.len()).filter(|at| labels[*at] == answer_key).collect();
        let [answer] = right[..] else {
            let choices = if right.is_empty() { "no choice" } else { "several choices" };
            let message = format!("answerKey {answer_key:?} is the label of {choices}; there are {labels:?}");
            return Err(lines.error(number, message));
        };
        let choices: Vec<String> = question.choices.into_iter().map(|choice| choice.text).collect();
        check(&choices).map_err(|message| lines.error(number, message))?;
        items.push(MultipleChoice { id, question: question.stem, choices, answer });
    }
    not_empty(path, items)
}

/// Reads a CSV file of MMLU (Hendrycks et al. 2021): question, four answers, the letter of the right one; no line of
/// names.
///
/// # Errors
/// If the file cannot be read or a row has another form.
pub fn load_mmlu(path: impl AsRef<Path>) -> Result<Vec<MultipleChoice>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut items = Vec::new();
    for (index, record) in reader.records().enumerate() {
        let record = record.map_err(|error| Error::file(path, format!("not CSV: {error}")))?;
        let line = record.position().map_or(0, csv::Position::line);
        let wrong = |message: String| Error::file(path, format!("line {line}: {message}"));
        let fields: Vec<&str> = record.iter().collect();
        let [question, choices @ .., letter] = fields.as_slice() else {
            return Err(wrong("a question, four answers and a letter are needed".into()));
        };
        let choices: Vec<String> = choices.iter().map(|choice| choice.to_string()).collect();
        let answer = ["A", "B", "C", "D"].iter().position(|one| one == letter);
        let (Some(answer), 4) = (answer, choices.len()) else {
            let message = format!(
                "a question, four answers and a letter from A to D are needed; found {} columns, the last {letter:?}",
                fields.len()
            );
            return Err(wrong(message));
        };
        check(&choices).map_err(wrong)?;
        items.push(MultipleChoice { id: format!("{stem}/{index}"), question: question.to_string(), choices, answer });
    }
    not_empty(path, items)
}

fn check(choices: &[String]) -> std::result::Result<(), String> {
    if choices.len() < 2 {
        return Err(format!("{} choices; at least two are needed", choices.len()));
    }
    match choices.iter().position(|choice| choice.trim().is_empty()) {
        Some(at) => Err(format!("choice {at} is empty; it must hold a text")),
        None => Ok(()),
    }
}

fn not_empty(path: &Path, items: Vec<MultipleChoice>) -> Result<Vec<MultipleChoice>> {
    if items.is_empty() {
        return Err(Error::file(path, "holds no question; at least one is needed"));
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file<T>(name: &str, text: &str, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn arc_has_letters_or_numbers() {
        let text = r#"{"id":"q","question":{"stem":"Which?","choices":[{"text":"a","label":"1"},{"text":"b","label":"2"}]},"answerKey":"2"}"#;
        let items = with_file("arc.jsonl", text, |path| load_arc(path)).unwrap();
        assert_eq!((items[0].answer, items[0].choices.as_slice()), (1, ["a".to_string(), "b".to_string()].as_slice()));
        let error =
            with_file("arc.jsonl", &text.replace(r#""answerKey":"2""#, r#""answerKey":"B""#), |path| load_arc(path));
        let message = error.unwrap_err().to_string();
        assert!(
            message.contains(r#"line 1: answerKey "B" is the label of no choice; there are ["1", "2"]"#),
            "{message}"
        );
        let twice = text.replace(r#""label":"1""#, r#""label":"2""#);
        let message = with_file("arc.jsonl", &twice, |path| load_arc(path)).unwrap_err().to_string();
        assert!(
            message.contains(r#"answerKey "2" is the label of several choices; there are ["2", "2"]"#),
            "{message}"
        );
        let error = with_file("arc.jsonl", &format!("{text}\n{text}\n"), |path| load_arc(path));
        let message = error.unwrap_err().to_string();
        assert!(message.ends_with(r#"line 2: has the id "q" of line 1; ids must be unique"#), "{message}");
    }

    #[test]
    fn mmlu_has_no_header() {
        let items = with_file("x_test.csv", "\u{feff}\"What, then?\",1,2,3,4,C\n", |path| load_mmlu(path)).unwrap();
        assert_eq!((items[0].id.as_str(), items[0].question.as_str(), items[0].answer), ("x_test/0", "What, then?", 2));
        for text in ["Q,1,2,3,C\n", "Q,1,2,3,4,E\n", "Q\n"] {
            let message = with_file("x.csv", text, |path| load_mmlu(path)).unwrap_err().to_string();
            assert!(message.contains("line 1") && message.contains("four answers"), "{message}");
        }
        let message = with_file("x.csv", "Q,,2,3,4,A\n", |path| load_mmlu(path)).unwrap_err().to_string();
        assert!(message.contains("line 1: choice 0 is empty"), "{message}");
    }
}
