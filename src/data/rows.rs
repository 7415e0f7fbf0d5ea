//! Rows as they are read from data sets, before they are tokens.

use serde::{Deserialize, Serialize};

use super::Message;

/// A request with a harmful and a safe answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerPair {
    /// Stable and unique in its file.
    pub id: String,
    /// What rows have in common that must not be split between training and validation: the behaviour's id, or, of a
    /// preference, what its users say.
    pub group: String,
    /// The file and the line or key that the row came from, for errors.
    pub place: String,
    /// The conversation up to the answer.
    pub messages: Vec<Message>,
    /// The answer to drive away from.
    pub harmful: String,
    /// Whether that is a whole answer, so that the end of its turn is a target too. HarmBench's targets are how an answer
    /// begins: an end behind one is next to impossible, and a loss that drives away from the target is satisfied by that one token.
    pub harmful_ends: bool,
    /// The answer to drive toward.
    pub safe: String,
    /// Whether a refusal judge does not apply, because harm is decided by comparing hashes (copyrighted text).
    pub hash_check: bool,
    /// HarmBench's kind of behaviour (`standard`, `contextual`, `copyright`), where the file has one.
    pub functional_category: Option<String>,
}

/// A harmless conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chat {
    /// Stable and unique in its file.
    pub id: String,
    /// The file and line that the row came from, for errors.
    pub place: String,
    /// All of its messages.
    pub messages: Vec<Message>,
}
