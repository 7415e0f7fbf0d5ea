//! In the chat template or without it.

use serde::{Deserialize, Serialize};

use crate::{ChatFormat, Error, Family, Result};

/// How a question or request is put to a model: a model can look useful without its template and refuse everything
/// within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Framing {
    /// As a user's message in the chat template.
    Template,
    /// As a text that the model goes on from.
    Text {
        /// Whether the begin-of-sequence token stands before it.
        bos: bool,
    },
}

impl Framing {
    /// Text as lm-evaluation-harness puts it to a model of a family: behind the begin-of-sequence token for Gemma,
    /// which predicts badly without, and as it is for all others.
    pub fn text_for(family: Family) -> Self {
        Self::Text { bos: family == Family::Gemma }
    }

    /// The tokens of a text without template.
    ///
    /// # Errors
    /// If the tokenizer refuses the text, or has no begin-of-sequence token where one is to stand.
    pub(super) fn plain(format: &ChatFormat, text: &str, bos: bool) -> Result<Vec<i64>> {
        let tokenizer = format.tokenizer();
        let mut ids = Vec::new();
        if bos {
            let id = tokenizer.bos_token().and_then(|token| tokenizer.id_of(token));
            let missing = || Error::mismatch("bos_token of the tokenizer", "one, to stand before a text", "none");
            ids.push(id.ok_or_else(missing)?);
        }
        ids.extend(tokenizer.encode(text)?);
        Ok(ids)
    }
}
