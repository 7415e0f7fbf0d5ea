//! HarmBench's own files of test cases and completions.

use std::{collections::BTreeMap, fmt, marker::PhantomData, path::Path};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};

use crate::{Error, Result, files, load_targets};

/// Prompts for each behaviour, by its id.
pub type TestCases = BTreeMap<String, Vec<String>>;

/// Prompts with their answers for each behaviour, by its id.
pub type Completions = BTreeMap<String, Vec<Completion>>;

/// A prompt and what a model said to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The prompt.
    pub test_case: String,
    /// What the model said.
    pub generation: String,
}

/// Reads test cases: an object from behaviour ids to lists of prompts.
///
/// # Errors
/// If the file cannot be read, has another form or an id twice, or holds no id.
pub fn load_test_cases(path: impl AsRef<Path>) -> Result<TestCases> {
    let path = path.as_ref();
    not_empty(path, load_targets(path)?.into_iter().collect())
}

/// Reads completions: an object from behaviour ids to lists of `{"test_case": text, "generation": text}`. Other fields,
/// such as HarmBench's labels, are ignored.
///
/// # Errors
/// If the file cannot be read, has another form or an id twice, or holds no id.
pub fn load_completions(path: impl AsRef<Path>) -> Result<Completions> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let mut deserializer = serde_json::Deserializer::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text));
    let read = OnceEach::<Vec<Completion>>::deserialize(&mut deserializer).and_then(|map| {
        deserializer.end()?;
        Ok(map.0)
    });
    let wrong = |error| {
        let form = r#"an object from behaviour ids to lists of {"test_case": text, "generation": text}, each id once"#;
        Error::file(path, format!("{error}; expected {form}"))
    };
    not_empty(path, read.map_err(wrong)?)
}

fn not_empty<T>(path: &Path, found: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    if found.is_empty() {
        return Err(Error::file(path, "holds no behaviour id; at least one is needed"));
    }
    Ok(found)
}

/// A JSON object that refuses a repeated key.
struct OnceEach<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OnceEach<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = OnceEach<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from behaviour ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OnceEach<T>, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((id, value)) = map.next_entry::<String, T>()? {
                    if entries.contains_key(&id) {
                        return Err(serde::de::Error::custom(format!("the id {id} occurs twice")));
                    }
                    entries.insert(id, value);
                }
                Ok(OnceEach(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T>(text: &str, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn files_of_harmbench_are_read_and_broken_ones_are_named() {
        let found = read("\u{feff}{\"a\": [\"x\", \"y\"]}", |path| load_test_cases(path)).unwrap();
        assert_eq!(found["a"], ["x", "y"]);
        let labelled = r#"{"a": [{"test_case": "x", "generation": "y", "label": 1}]}"#;
        let found = read(labelled, |path| load_completions(path)).unwrap();
        assert_eq!(found["a"], [Completion { test_case: "x".into(), generation: "y".into() }]);
        let wrong = |text: &str| {
            let messages = [
                read(text, |path| load_test_cases(path)).unwrap_err().to_string(),
                read(text, |path| load_completions(path)).unwrap_err().to_string(),
            ];
            messages.join("\n")
        };
        assert_eq!(wrong("{}").matches("x.json: holds no behaviour id; at least one is needed").count(), 2);
        assert_eq!(wrong(r#"{"a": [], "a": []}"#).matches("the id a occurs twice").count(), 2);
        assert_eq!(wrong(r#"{"a": []} x"#).matches("trailing characters").count(), 2);
        assert_eq!(wrong("[1]").matches("expected an object from behaviour ids to lists").count(), 2);
    }
}
