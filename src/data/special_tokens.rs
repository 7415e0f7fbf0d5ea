//! The special tokens and stop ids that the JSON files of a model folder name.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Special tokens by name (`bos_token`, `eos_token`, `pad_token`, …): what chat templates see as variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    /// Pairs of a name that ends in `_token` and its token.
    pub fn new<N: Into<String>, T: Into<String>>(tokens: impl IntoIterator<Item = (N, T)>) -> Self {
        Self(tokens.into_iter().map(|(name, token)| (name.into(), token.into())).collect())
    }

    /// Reads `tokenizer_config.json`, then `special_tokens_map.json` for names that the first does not have. Both are
    /// optional.
    ///
    /// # Errors
    /// If a file that is there cannot be read or is not a JSON object.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(config) = read_json(&folder.as_ref().join(name))? else { continue };
            for (name, value) in config {
                // add_bos_token and the like are flags, and null means that there is no such token.
                let Some(token) = token_text(&value).filter(|_| name.ends_with("_token")) else { continue };
                tokens.entry(name).or_insert_with(|| token.to_string());
            }
        }
        Ok(Self(tokens))
    }

    /// The token of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All names and tokens, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, token)| (name.as_str(), token.as_str()))
    }

    /// What `tokenizer_config.json` says about them.
    pub(crate) fn to_config(&self) -> Value {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.extend(self.0.iter().map(|(name, token)| (name.clone(), token.as_str().into())));
        Value::Object(config)
    }
}

/// A token is a string, or an object that holds it as its content.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A JSON object file, or none if the file does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let object = serde_json::from_str(&text)
        .map_err(|error| Error::file(path, format!("not a JSON object: {error}; it must be one in UTF-8")))?;
    Ok(Some(object))
}

/// The ids under `eos_token_id`: a number, a list of numbers, or nothing.
pub(crate) fn stop_ids(path: &Path, config: &Map<String, Value>) -> Result<Vec<i64>> {
    let wrong = |value: &Value| {
        Error::file(path, format!("eos_token_id = {value}: must be a token id, a list of token ids or null"))
    };
    let id = |value: &Value| value.as_i64().filter(|id| *id >= 0).ok_or_else(|| wrong(value));
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_file_fills_what_the_config_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
            "add_bos_token": true, "chat_template": "x"}"#;
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let map =
            r#"{"bos_token": "<other>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<a>"]}"#;
        fs::write(folder.path().join("special_tokens_map.json"), map).unwrap();
        let tokens = SpecialTokens::load(folder.path()).unwrap();
        let expected = [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")];
        assert_eq!(tokens.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_broken_config_is_an_error_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer_config.json"), "[1]").unwrap();
        let message = SpecialTokens::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer_config.json") && message.contains("JSON object"), "{message}");
    }

    #[test]
    fn stop_ids_are_a_number_a_list_or_nothing() {
        let ids = |text: &str| stop_ids(Path::new("config.json"), &serde_json::from_str(text).unwrap());
        assert_eq!(ids(r#"{"eos_token_id": 2}"#).unwrap(), [2]);
        assert_eq!(ids(r#"{"eos_token_id": [7, 1]}"#).unwrap(), [7, 1]);
        assert!(ids(r#"{"eos_token_id": null}"#).unwrap().is_empty());
        let message = ids(r#"{"eos_token_id": ["a"]}"#).unwrap_err().to_string();
        assert_eq!(message, r#"config.json: eos_token_id = "a": must be a token id, a list of token ids or null"#);
    }
}
