//! Preference pairs in the JSONL forms of TRL.

use std::path::Path;

use serde::Deserialize;

use super::{
    AnswerPair, LoadReport, Message,
    json_objects::{Id, JsonObjects},
    overlap::users_words,
};
use crate::{Error, Result};

const FORM: &str = r#"{"prompt"?, "chosen", "rejected"}, each a text or a list of {"role", "content"}"#;

#[derive(Debug, Deserialize)]
struct Line {
    id: Option<Id>,
    prompt: Option<Text>,
    chosen: Text,
    rejected: Text,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of {\"role\", \"content\"}")]
enum Text {
    Plain(String),
    Messages(Vec<Message>),
}

impl Text {
    fn is_empty(&self) -> bool {
        match self {
            Self::Plain(text) => text.trim().is_empty(),
            Self::Messages(messages) => messages.is_empty(),
        }
    }
}

/// Reads preference pairs: `chosen` becomes the safe answer and `rejected` the harmful one.
///
/// `prompt` is a text (one user message) or messages, and the answers are texts or single messages. Where the answers are
/// whole conversations, with or without a `prompt` beside them, the messages that both begin with are the prompt. An empty
/// `prompt` is as none. A row's id is its `id` (a text or a whole number), or else `file stem:line`. Rows with an empty
/// answer or two equal ones are counted and left out.
///
/// # Errors
/// If the file cannot be read, a line has another form, or no row is left. Two texts without a `prompt` (TRL's standard form
/// with an implicit prompt) are an error too: where in them the prompt ends cannot be told.
pub fn load_preferences(path: impl AsRef<Path>) -> Result<(Vec<AnswerPair>, LoadReport)> {
    let path = path.as_ref();
    let mut lines = JsonObjects::<Line>::open(path, FORM)?;
    let mut report = LoadReport::default();
    let mut pairs = Vec::new();
    while let Some(line) = lines.next() {
        let (line, row) = line?;
        let (messages, chosen, rejected) =
            split(row.prompt, row.chosen, row.rejected).map_err(|message| lines.error(line, message))?;
        let id = lines.id(row.id, line);
        if chosen.trim().is_empty() || rejected.trim().is_empty() {
            report.add("empty_answer", "rows with an empty answer left out", id);
            continue;
        }
        if chosen == rejected {
            report.add("equal_answers", "rows whose two answers are equal left out", id);
            continue;
        }
        pairs.push(AnswerPair {
            // Several answers to one request stay on one side of a split.
            group: users_words(&messages).map_or_else(|| id.clone(), |words| words.join(" ")),
            id,
            place: lines.place(line),
            messages,
            harmful: rejected,
            harmful_ends: true,
            safe: chosen,
            hash_check: false,
            functional_category: None,
        });
    }
    report.rows = pairs.len();
    report.warn(&path.display().to_string());
    if pairs.is_empty() {
        return Err(Error::file(path, format!("no preference pair is left: {report}")));
    }
    Ok((pairs, report))
}

/// Prompt, chosen and rejected answer; the error says what is wrong with the row.
fn split(prompt: Option<Text>, chosen: Text, rejected: Text) -> Result<(Vec<Message>, String, String), String> {
    let prompt = prompt.filter(|prompt| !prompt.is_empty());
    match (chosen, rejected) {
        (Text::Plain(chosen), Text::Plain(rejected)) => match prompt {
            Some(prompt) => Ok((messages(prompt), chosen, rejected)),
            None => {
                Err("prompt is missing or empty; where chosen and rejected are texts, it cannot be told from them"
                    .into())
            }
        },
        (Text::Messages(chosen), Text::Messages(rejected)) => match prompt {
            Some(prompt) if !is_in(&prompt, &chosen) => {
                Ok((messages(prompt), only_answer("chosen", chosen)?, only_answer("rejected", rejected)?))
            }
            _ => shared_prompt(chosen, rejected),
        },
        _ => Err("one of chosen and rejected is a text and the other a list; both must be the same".into()),
    }
}

/// Whether an answer is a whole conversation that holds the prompt which stands beside it. Beside a text, which may lack
/// the system prompt, everything longer than one message is one.
fn is_in(prompt: &Text, answer: &[Message]) -> bool {
    match prompt {
        Text::Plain(_) => answer.len() > 1,
        Text::Messages(prompt) => answer.starts_with(prompt),
    }
}

fn messages(prompt: Text) -> Vec<Message> {
    match prompt {
        Text::Plain(text) => vec![Message::user(text)],
        Text::Messages(messages) => messages,
    }
}

/// Two whole conversations that part at their last message.
fn shared_prompt(
    mut chosen: Vec<Message>,
    mut rejected: Vec<Message>,
) -> Result<(Vec<Message>, String, String), String> {
    let shared = chosen.iter().zip(&rejected).take_while(|(left, right)| left == right).count();
    // Two equal answers are still answers.
    let shared = shared.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
    if shared == 0 {
        return Err("chosen and rejected share no first message, and one of them must hold the prompt".to_string());
    }
    let chosen_answer = only_answer("chosen", chosen.split_off(shared))?;
    let rejected_answer = only_answer("rejected", rejected.split_off(shared))?;
    Ok((chosen, chosen_answer, rejected_answer))
}

fn only_answer(field: &str, messages: Vec<Message>) -> Result<String, String> {
    match <[Message; 1]>::try_from(messages) {
        Ok([answer]) if answer.is_assistant() => Ok(answer.content),
        Ok([answer]) => Err(format!("{field} ends with a message of the role {}; it must be assistant", answer.role)),
        Err(several) => {
            Err(format!("{field} has {} messages behind the prompt; it must be one of the assistant", several.len()))
        }
    }
}

#[cfg(test)]
#[path = "preferences_tests.rs"]
mod tests;
