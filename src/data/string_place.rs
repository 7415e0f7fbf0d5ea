//! Conversations with a place for a string that an attack looks for.

use super::{ChatFormat, Message, chat_format::PromptAndContent, python_strings::is_space};
use crate::{Error, ErrorKind, Result};

/// A conversation whose last message has a place for a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StringPlace {
    earlier: Vec<Message>,
    role: String,
    before: String,
    after: String,
}

/// The tokens of a prompt, apart at the borders of a string in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedString {
    /// What comes before the string's own tokens.
    pub before: Vec<i64>,
    /// The tokens that stand for nothing but the string.
    pub string: Vec<i64>,
    /// What comes behind them, up to the answer.
    pub behind: Vec<i64>,
    /// The text of `before`.
    before_text: String,
    /// The string's first bytes, if the last token of `before` stands for them too.
    head: String,
    /// The same of its last bytes and the first token of `behind`.
    tail: String,
}

impl PlacedString {
    /// The tokens of the prompt with others in place of the string's.
    pub fn with(&self, string: &[i64]) -> Vec<i64> {
        [&self.before, string, &self.behind].concat()
    }
}

impl StringPlace {
    /// The place between two texts of the last message.
    ///
    /// # Errors
    /// If there is no message, or the last one is an answer.
    pub fn new(mut messages: Vec<Message>, after: impl Into<String>) -> Result<Self> {
        match messages.pop() {
            Some(last) if !last.is_assistant() => {
                Ok(Self { earlier: messages, role: last.role, before: last.content, after: after.into() })
            }
            other => {
                let found = other.map_or("no message".to_string(), |last| format!("one of the role {}", last.role));
                Err(Error::mismatch("conversation with a place for a string", "a last message of the user's", found))
            }
        }
    }

    /// The conversation with a string in the place.
    pub fn messages(&self, string: &str) -> Vec<Message> {
        let last = Message::new(&self.role, format!("{}{string}{}", self.before, self.after));
        self.earlier.iter().cloned().chain([last]).collect()
    }

    /// The tokens of the prompt with a string in the place.
    ///
    /// # Errors
    /// If the template refuses the conversation or alters its contents, or no token is the string's alone.
    pub fn encode(&self, format: &ChatFormat, string: &str) -> Result<PlacedString> {
        let PromptAndContent { text, tokens, content } =
            format.prompt_and_content(&self.messages(string), self.earlier.len())?;
        let nothing = || Error::mismatch("string in a prompt", "at least one token of its own", format!("{string:?}"));
        let content = content.ok_or_else(nothing)?;
        // The content without its outer white space, which may be the string's.
        let start = match self.before.trim_start_matches(is_space) {
            "" => content.start - self.space_before(string, &text[..content.start]),
            before => content.start + before.len(),
        };
        let end = content.end - self.after.trim_end_matches(is_space).len();
        let from = tokens.partition_point(|token| token.bytes.start < start);
        let to = tokens.partition_point(|token| token.bytes.end <= end);
        if from >= to {
            return Err(nothing());
        }
        let ids = |range: std::ops::Range<usize>| tokens[range].iter().map(|token| token.id).collect::<Vec<i64>>();
        let before = ids(0..from);
        Ok(PlacedString {
            before_text: format.tokenizer().decode(&before, false)?,
            head: text.get(start..tokens[from].bytes.start).unwrap_or_default().to_string(),
            tail: text.get(tokens[to - 1].bytes.end..end).unwrap_or_default().to_string(),
            before,
            string: ids(from..to),
            behind: ids(to..tokens.len()),
        })
    }

    /// The string whose conversation has these tokens in place of the string's own, or `None` if none has: if the text that
    /// they stand for would be read as other tokens.
    ///
    /// # Errors
    /// If the tokenizer refuses the tokens.
    pub fn string_of(&self, format: &ChatFormat, placed: &PlacedString, ids: &[i64]) -> Result<Option<String>> {
        // Decoders drop a leading space, so what stands before is decoded too.
        let joint = format.tokenizer().decode(&[&placed.before, ids].concat(), false)?;
        let Some(own) = joint.strip_prefix(&placed.before_text) else { return Ok(None) };
        let string = format!("{}{own}{}", placed.head, placed.tail);
        match format.prompt(&self.messages(&string)) {
            Ok(read) => Ok((read.ids() == placed.with(ids)).then_some(string)),
            // A template may refuse what the string makes of its conversation.
            Err(error) if matches!(error.kind(), ErrorKind::Conversation { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Of the white space that a message of nothing but the string begins with, the bytes that the template keeps: `text` is
    /// what it renders up to the rest of the message.
    fn space_before(&self, string: &str, text: &str) -> usize {
        let message = format!("{}{string}", self.before);
        let space = &message[..message.len() - message.trim_start_matches(is_space).len()];
        if text.ends_with(space) { space.len() - self.before.len().min(space.len()) } else { 0 }
    }
}
