//! Rows of text to examples of tokens, within a length limit.

use std::collections::HashMap;

use super::{
    AnswerPair, Chat, ChatFormat, Continuation, ContinuationKind, Example, LoadReport, Message, TokenKind, Tokens,
    chat_format::{EncodedChat, Turns},
};
use crate::{Error, ErrorKind, Result, error::Context};

/// Turns pairs into examples with a harmful and a safe continuation. Prompt and either continuation together have at most
/// `max_tokens` tokens; longer answers are cut and counted. The end of the turn is a target behind the safe answer, and behind a
/// harmful one that is whole ([`AnswerPair::harmful_ends`]). Pairs that the template refuses are counted and left out.
///
/// # Errors
/// If an answer is empty, a prompt leaves no room for an answer or depends on it, two rows have the same id, a row cannot be
/// tokenised, or none is left.
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
        let encoded = encode_pair(format, pair, max_tokens);
        let Some([harmful, safe]) = taken(encoded, &pair.id, &mut report)
            .context(|| format!("encoding the row {} of {}", pair.id, pair.place))?
        else {
            continue;
        };
        let mut answer = |kind, encoded| example(kind, encoded, max_tokens, &pair.id, &mut report);
        let (harmful, safe) = (answer(ContinuationKind::Harmful, harmful)?, answer(ContinuationKind::Safe, safe)?);
        let doing =
            || format!("joining the two answers of {}, on which the template lets the prompt depend", pair.place);
        examples.push(harmful.join(safe).context(doing)?);
    }
    finish(examples, report, "pairs of answers")
}

/// Turns conversations into examples with a utility continuation of at most `max_tokens` tokens with its prompt. With
/// [`Turns::Last`] the last answer is the last one of which a token lies within the limit.
///
/// Conversations are counted and left out that have no answer or an empty one, that the template refuses, or of which
/// nothing that is learnt lies within the limit.
///
/// # Errors
/// If a conversation cannot be read or tokenised, two have the same id, or none is left.
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
        let encoded = encode_chat(format, &chat.messages, max_tokens, turns);
        let Some(encoded) = taken(encoded, &chat.id, &mut report)
            .context(|| format!("encoding the conversation {} of {}", chat.id, chat.place))?
        else {
            continue;
        };
        if let Some((name, what)) = without_tokens(&encoded, max_tokens) {
            report.add(name, what, &chat.id);
            continue;
        }
        examples.push(example(ContinuationKind::Utility, encoded, max_tokens, &chat.id, &mut report)?);
    }
    finish(examples, report, "conversations")
}

/// None, and a note in the report, where the template does not take the conversation.
fn taken<T>(encoded: Result<T>, id: &str, report: &mut LoadReport) -> Result<Option<T>> {
    match encoded {
        Ok(encoded) => Ok(Some(encoded)),
        Err(error) if matches!(error.kind(), ErrorKind::Conversation { .. }) => {
            let what =
                format!("rows left out that the chat template does not take, the first for this reason: {error}");
            report.add("refused", &what, id);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The harmful and the safe answer, each with its prompt, which leaves room for an answer.
fn encode_pair(format: &ChatFormat, pair: &AnswerPair, max_tokens: usize) -> Result<[EncodedChat; 2]> {
    let encode = |name: &str, answer: &str, ends: bool| {
        if answer.trim().is_empty() {
            return Err(Error::example(&pair.id, format!("its {name} answer is empty; it must hold a text")));
        }
        let encoded =
            if ends { format.answer(&pair.messages, answer)? } else { format.opening(&pair.messages, answer)? };
        let length = encoded.prompt.len();
        if length >= max_tokens {
            let message = format!(
                "its prompt has {length} tokens and leaves no room for an answer within max_tokens = {max_tokens}"
            );
            return Err(Error::example(&pair.id, message));
        }
        Ok(encoded)
    };
    Ok([encode("harmful", &pair.harmful, pair.harmful_ends)?, encode("safe", &pair.safe, true)?])
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

/// The same of a conversation as tokens.
fn without_tokens(encoded: &EncodedChat, max_tokens: usize) -> Option<(&'static str, &'static str)> {
    if encoded.prompt.is_empty() {
        return Some(("no_prompt", "conversations left out whose prompt has no token"));
    }
    let found = has_target(encoded, max_tokens);
    (!found).then_some(("no_target", "conversations left out of which no target lies within the length limit"))
}

/// With [`Turns::Last`] up to the last answer that has a target within the limit, or to the first if none has.
fn encode_chat(format: &ChatFormat, messages: &[Message], max_tokens: usize, turns: Turns) -> Result<EncodedChat> {
    let mut encoded = format.chat(messages, turns)?;
    let answers = messages.iter().enumerate().rev().filter(|(_, message)| message.is_assistant());
    for (answer, _) in answers.skip(1).filter(|_| turns == Turns::Last) {
        if has_target(&encoded, max_tokens) {
            break;
        }
        encoded = format.chat(&messages[..=answer], turns)?;
    }
    Ok(encoded)
}

fn has_target(encoded: &EncodedChat, max_tokens: usize) -> bool {
    let room = max_tokens.saturating_sub(encoded.prompt.len());
    encoded.continuation.kinds().iter().take(room).any(|kind| *kind == TokenKind::Target)
}

/// One prompt and one answer, which is cut to the limit, and behind its last target.
fn example(
    kind: ContinuationKind,
    encoded: EncodedChat,
    max_tokens: usize,
    id: &str,
    report: &mut LoadReport,
) -> Result<Example> {
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
    Example::new(id, encoded.prompt, vec![Continuation { kind, tokens }])
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
