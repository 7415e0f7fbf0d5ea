//! Rows of text to examples of tokens, within a length limit.

use std::collections::HashMap;

use super::{
    AnswerPair, Chat, ChatFormat, Continuation, ContinuationKind, Example, LoadReport, Message, TokenKind, Tokens,
    chat_format::{EncodedChat, Turns},
};
use crate::{Error, Result, error::Context};

/// Turns pairs into examples with a harmful and a safe continuation. Prompt and either continuation together have at most
/// `max_tokens` tokens; longer answers are cut and counted.
///
/// # Errors
/// If a prompt leaves no room for an answer, two rows have the same id, there is no row, or a row cannot be rendered.
pub fn encode_pairs(
    format: &ChatFormat,
    pairs: &[AnswerPair],
    max_tokens: usize,
) -> Result<(Vec<Example>, LoadReport)> {
    check_limit(max_tokens)?;
    let mut ids = UniqueIds::default();
    let mut report = LoadReport::default();
    let mut examples = Vec::with_capacity(pairs.len());
    for pair in pairs {
        ids.insert(&pair.id, &pair.place)?;
        let doing = || format!("encoding the row {} of {}", pair.id, pair.place);
        let harmful = format.answer(&pair.messages, &pair.harmful).context(doing)?;
        let safe = format.answer(&pair.messages, &pair.safe).context(doing)?;
        if harmful.prompt != safe.prompt {
            let message = format!(
                "its two answers have prompts of {} and {} different tokens, because the template's prompt depends on the answer",
                harmful.prompt.len(),
                safe.prompt.len()
            );
            return Err(Error::example(&pair.id, message));
        }
        if harmful.prompt.len() >= max_tokens {
            let message = format!(
                "its prompt has {} tokens and leaves no room for an answer within max_tokens = {max_tokens} ({})",
                harmful.prompt.len(),
                pair.place
            );
            return Err(Error::example(&pair.id, message));
        }
        let prompt = harmful.prompt.clone();
        let continuations = vec![
            continuation(ContinuationKind::Harmful, harmful, max_tokens, &pair.id, &mut report),
            continuation(ContinuationKind::Safe, safe, max_tokens, &pair.id, &mut report),
        ];
        examples.push(Example::new(&pair.id, prompt, continuations)?);
    }
    finish(examples, report, "pairs of answers")
}

/// Turns conversations into examples with a utility continuation of at most `max_tokens` tokens with its prompt. With
/// [`Turns::Last`] the last answer is the last one that begins within the limit.
///
/// Conversations without an answer, with an empty one, or whose prompt leaves no room are counted and left out.
///
/// # Errors
/// If a conversation cannot be read or rendered, two have the same id, or none is left.
pub fn encode_chats(
    format: &ChatFormat,
    chats: impl IntoIterator<Item = Result<Chat>>,
    max_tokens: usize,
    turns: Turns,
) -> Result<(Vec<Example>, LoadReport)> {
    check_limit(max_tokens)?;
    let mut ids = UniqueIds::default();
    let mut report = LoadReport::default();
    let mut examples = Vec::new();
    for chat in chats {
        let chat = chat?;
        ids.insert(&chat.id, &chat.place)?;
        if let Some((name, what)) = unusable(&chat.messages) {
            report.add(name, what, &chat.id);
            continue;
        }
        let encoded = encode_chat(format, &chat.messages, max_tokens, turns)
            .context(|| format!("encoding the conversation {} of {}", chat.id, chat.place))?;
        let Some(encoded) = encoded else {
            report.add("too_long", "conversations left out whose prompt leaves no room for an answer", &chat.id);
            continue;
        };
        let prompt = encoded.prompt.clone();
        let continuation = continuation(ContinuationKind::Utility, encoded, max_tokens, &chat.id, &mut report);
        examples.push(Example::new(&chat.id, prompt, vec![continuation])?);
    }
    finish(examples, report, "conversations")
}

/// Why a conversation teaches nothing: the name of a note and its words.
fn unusable(messages: &[Message]) -> Option<(&'static str, &'static str)> {
    let mut answers = messages.iter().filter(|message| message.is_assistant()).peekable();
    if answers.peek().is_none() || messages.first().is_some_and(Message::is_assistant) {
        return Some(("no_answer", "conversations without a prompt and an answer left out"));
    }
    let empty = answers.any(|answer| answer.content.trim().is_empty());
    empty.then_some(("empty_answer", "conversations with an empty answer left out"))
}

/// None if not even the first answer begins within the limit.
fn encode_chat(
    format: &ChatFormat,
    messages: &[Message],
    max_tokens: usize,
    turns: Turns,
) -> Result<Option<EncodedChat>> {
    let fits = |encoded: &EncodedChat| encoded.prompt.len() < max_tokens;
    if turns == Turns::All {
        return Ok(Some(format.chat(messages, turns)?).filter(fits));
    }
    let answers = messages.iter().enumerate().rev().filter(|(_, message)| message.is_assistant());
    for (answer, _) in answers {
        let encoded = format.chat(&messages[..=answer], turns)?;
        if fits(&encoded) {
            return Ok(Some(encoded));
        }
    }
    Ok(None)
}

/// Cuts the continuation to the limit, and behind its last target.
fn continuation(
    kind: ContinuationKind,
    encoded: EncodedChat,
    max_tokens: usize,
    id: &str,
    report: &mut LoadReport,
) -> Continuation {
    if encoded.boundary_merged {
        report.add(
            "boundary_merged",
            "answers tokenised apart from their prompt, whose last token they would change",
            id,
        );
    }
    let mut tokens = encoded.continuation;
    let room = max_tokens.saturating_sub(encoded.prompt.len());
    if tokens.len() > room {
        let (name, what) = match kind {
            ContinuationKind::Harmful => ("harmful_truncated", "harmful answers cut to the length limit"),
            ContinuationKind::Safe => ("safe_truncated", "safe answers cut to the length limit"),
            ContinuationKind::Utility => ("utility_truncated", "conversations cut to the length limit"),
        };
        report.add(name, what, id);
        tokens.truncate(room);
        tokens.truncate(behind_last_target(&tokens));
    }
    Continuation { kind, tokens }
}

fn behind_last_target(tokens: &Tokens) -> usize {
    tokens.kinds().iter().rposition(|kind| *kind == TokenKind::Target).map_or(0, |last| last + 1)
}

fn finish(examples: Vec<Example>, mut report: LoadReport, what: &str) -> Result<(Vec<Example>, LoadReport)> {
    report.rows = examples.len();
    report.warn(what);
    if examples.is_empty() {
        return Err(Error::mismatch(what, "at least one that can be used", report));
    }
    Ok((examples, report))
}

fn check_limit(max_tokens: usize) -> Result<()> {
    if max_tokens < 2 {
        return Err(Error::setting("max_tokens", max_tokens, "at least 2: one token of prompt and one of answer"));
    }
    Ok(())
}

/// The ids so far and where each was found.
#[derive(Default)]
struct UniqueIds(HashMap<String, String>);

impl UniqueIds {
    fn insert(&mut self, id: &str, place: &str) -> Result<()> {
        match self.0.insert(id.to_string(), place.to_string()) {
            None => Ok(()),
            Some(first) => Err(Error::example(id, format!("is there twice: {first}, and {place}; ids must be unique"))),
        }
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
