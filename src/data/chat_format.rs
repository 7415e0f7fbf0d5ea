//! Conversations to tokens whose kinds are known by construction: a tokenizer and a chat template together.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use super::{ChatTemplate, Date, Message, TokenKind, TokenSpan, Tokenizer, Tokens, rendered::Rendered};
use crate::{Error, Result, error::Context};

/// Which answers of a conversation are targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turns {
    /// Every answer.
    #[default]
    All,
    /// The last answer; those before it are read and not predicted.
    Last,
}

/// A prompt and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedChat {
    /// Everything up to the first answer that is a target, tokenised as at inference.
    pub prompt: Tokens,
    /// From there on. Ends with the last target.
    pub continuation: Tokens,
    /// The tokenizer would have merged text across the border, so both sides were tokenised apart.
    pub boundary_merged: bool,
}

/// Turns conversations into tokens.
///
/// What a token is follows from where the template put each message's content; no text is searched for role tags.
/// White space around a content counts as the template's. No begin-of-sequence token is added besides the template's own.
#[derive(Clone, Debug)]
pub struct ChatFormat {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_of_turn: Option<i64>,
    warned: Arc<AtomicBool>,
}

impl ChatFormat {
    /// Tries the template on a conversation of one turn, and warns if no end-of-turn token follows the answer: a model
    /// trained that way does not learn to stop.
    ///
    /// # Errors
    /// If that conversation cannot be rendered or encoded.
    pub fn new(tokenizer: Tokenizer, template: ChatTemplate) -> Result<Self> {
        let mut format = Self { tokenizer, template, end_of_turn: None, warned: Arc::default() };
        let probe = format
            .answer(&[Message::user("Hello")], "Hello")
            .context(|| "trying the chat template on a conversation of one turn")?;
        let last = probe.continuation.ids().last().copied();
        format.end_of_turn = last.filter(|id| format.is_end(*id));
        if format.end_of_turn.is_none() {
            tracing::warn!(
                "the chat template ends an answer without a special token: the end of a turn is not learned"
            );
        }
        Ok(format)
    }

    /// Tokenizer and chat template of a model folder.
    ///
    /// # Errors
    /// As [`Tokenizer::load`], [`ChatTemplate::load`] and [`ChatFormat::new`].
    pub fn load(folder: impl AsRef<std::path::Path>) -> Result<Self> {
        Self::new(Tokenizer::load(folder.as_ref())?, ChatTemplate::load(folder)?)
    }

    /// The same format, its template printing another date where it asks for today's: see [`ChatTemplate::with_date`].
    #[must_use]
    pub fn with_date(self, date: Date) -> Self {
        Self { template: self.template.with_date(date), ..self }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The token with which the template ends an answer, if it is a special one.
    pub fn end_of_turn(&self) -> Option<i64> {
        self.end_of_turn
    }

    /// The ids at which generation stops: [`Tokenizer::end_ids`], and the template's end-of-turn token.
    pub fn end_ids(&self) -> Vec<i64> {
        let mut ids = self.tokenizer.end_ids().to_vec();
        ids.extend(self.end_of_turn.filter(|id| !ids.contains(id)));
        ids
    }

    /// What the model reads before it answers: all messages and the header of the answer.
    ///
    /// # Errors
    /// If the template refuses the messages or alters their content.
    pub fn prompt(&self, messages: &[Message]) -> Result<Tokens> {
        let rendered = Rendered::new(&self.template, messages, true)?;
        let tokens = self.tokenizer.encode_with_offsets(&rendered.text)?;
        label(&tokens, &[], &rendered.user_contents(messages))
    }

    /// The tokens of [`ChatFormat::prompt`] with the bytes of the text that each stands for, and those where the content of a
    /// message lies, its outer white space left out; `None` if there is nothing of it.
    pub(super) fn prompt_and_content(&self, messages: &[Message], message: usize) -> Result<PromptAndContent> {
        let rendered = Rendered::new(&self.template, messages, true)?;
        let tokens = self.tokenizer.encode_with_offsets(&rendered.text)?;
        Ok(PromptAndContent { content: rendered.content(message), text: rendered.text, tokens })
    }

    /// A prompt and how an answer to it begins: the target is the text alone, without what ends a turn.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`]; if the text has no token.
    pub fn opening(&self, messages: &[Message], text: &str) -> Result<EncodedChat> {
        let mut chat = messages.to_vec();
        chat.push(Message::assistant(text));
        let rendered = Rendered::new(&self.template, &chat, false)?;
        let turn = self.turn(&chat, &rendered, messages.len())?;
        let opening = turn.start..turn.content_end;
        let encoded = self.encode(&chat, &rendered, &[turn], Some(&[opening]))?;
        if encoded.continuation.is_empty() {
            return Err(Error::mismatch("beginning of an answer", "a text of at least one token", format!("{text:?}")));
        }
        Ok(encoded)
    }

    /// A prompt and one answer to it. The target goes from the end of the generation prompt to the end-of-turn token. Two
    /// answers to the same messages have the same prompt tokens.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`].
    pub fn answer(&self, messages: &[Message], answer: &str) -> Result<EncodedChat> {
        let mut chat = messages.to_vec();
        chat.push(Message::assistant(answer));
        let rendered = Rendered::new(&self.template, &chat, false)?;
        let turn = self.turn(&chat, &rendered, messages.len())?;
        self.encode(&chat, &rendered, &[turn], None)
    }

    /// A whole conversation: the prompt is everything before the first (or last) answer, the continuation holds the answers
    /// as targets and the users' turns between them. Messages behind the last answer are dropped. Where the template has
    /// generation tags, they say what the targets are.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`]; if there is no answer, or nothing before the first one.
    pub fn chat(&self, messages: &[Message], turns: Turns) -> Result<EncodedChat> {
        let answers = messages.iter().enumerate().filter(|(_, message)| message.is_assistant());
        let mut answers: Vec<usize> = answers.map(|(index, _)| index).collect();
        let Some(&last) = answers.last() else {
            return Err(Error::mismatch("conversation", "a message of the role assistant", roles(messages)));
        };
        if turns == Turns::Last {
            answers = vec![last];
        }
        if answers[0] == 0 {
            return Err(Error::mismatch("conversation", "a message before the first answer", roles(messages)));
        }
        let messages = &messages[..=last];
        let rendered = Rendered::new(&self.template, messages, false)?;
        let found = answers.iter().map(|&answer| self.turn(messages, &rendered, answer)).collect::<Result<Vec<_>>>()?;
        let tagged = self.template.has_generation_tags().then_some(rendered.generation.as_slice());
        self.encode(messages, &rendered, &found, tagged)
    }

    /// Where an answer lies in a rendered conversation.
    fn turn(&self, messages: &[Message], rendered: &Rendered, answer: usize) -> Result<Turn> {
        let text = rendered.text.as_str();
        let header = self.template.render(&messages[..answer], true)?;
        let content = rendered.content(answer);
        let fits = text.starts_with(&header) && content.as_ref().is_none_or(|content| header.len() <= content.start);
        let start = match &content {
            _ if fits => header.len(),
            Some(content) => {
                self.check_earlier(&messages[..answer], rendered)?;
                self.warn_about_header();
                content.start
            }
            None => {
                return Err(self.template.error("an answer is empty or left out, so where it begins cannot be told"));
            }
        };
        let content_end = content.map_or(start, |content| content.end);
        // What the conversation up to this answer has in common with the whole one belongs to this turn.
        let common = common_prefix(&self.template.render(&messages[..=answer], false)?, text);
        let limit = if common >= content_end { common } else { rendered.next_content(content_end) };
        Ok(Turn { start, content_end, limit })
    }

    /// Where the generation prompt is not how an answer begins, all up to the last earlier message must still be rendered as
    /// it is without the answer: else training reads a prompt that the model never meets.
    fn check_earlier(&self, earlier: &[Message], rendered: &Rendered) -> Result<()> {
        let alone = Rendered::new(&self.template, earlier, true)?;
        let places = |of: &Rendered| (0..earlier.len()).map(|message| of.content(message)).collect::<Vec<_>>();
        let (own, with_answer) = (places(&alone), places(rendered));
        let end = own.iter().flatten().map(|content| content.end).max();
        if own == with_answer && end.is_some_and(|end| alone.text[..end] == rendered.text[..end]) {
            return Ok(());
        }
        Err(self.template.error("the messages before an answer are rendered otherwise once the answer is there"))
    }

    fn warn_about_header(&self) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the chat template's generation prompt is not how it begins an answer: targets begin at the answer's text"
            );
        }
    }

    /// Tokenises and labels. `tagged` says what the targets are; without it they are the turns.
    fn encode(
        &self,
        messages: &[Message],
        rendered: &Rendered,
        turns: &[Turn],
        tagged: Option<&[Range<usize>]>,
    ) -> Result<EncodedChat> {
        let border = turns.iter().map(|turn| turn.start).min().unwrap_or(rendered.text.len());
        let (prompt, rest, boundary_merged) = self.split(&rendered.text, border)?;
        let targets: Vec<Range<usize>> = match tagged {
            None => turns.iter().map(|turn| turn.start..self.end_of_target(&rest, turn)).collect(),
            Some(spans) => {
                let behind = spans.iter().filter(|span| span.end > border);
                behind.map(|span| span.start.max(border)..span.end).collect()
            }
        };
        let users = rendered.user_contents(messages);
        let mut continuation = label(&rest, &targets, &users)?;
        let last = continuation.kinds().iter().rposition(|kind| *kind == TokenKind::Target);
        continuation.truncate(last.map_or(0, |last| last + 1));
        Ok(EncodedChat { prompt: label(&prompt, &[], &users)?, continuation, boundary_merged })
    }

    /// The tokens before and after a border. The prompt is tokenised alone, as at inference; what follows comes from the
    /// whole text if that begins with the same tokens.
    fn split(&self, text: &str, border: usize) -> Result<(Vec<TokenSpan>, Vec<TokenSpan>, bool)> {
        let prompt = self.tokenizer.encode_with_offsets(&text[..border])?;
        let mut whole = self.tokenizer.encode_with_offsets(text)?;
        let before = whole.iter().take_while(|token| token.bytes.start < border).count();
        let same = before == prompt.len() && prompt.iter().zip(&whole).all(|(alone, joint)| alone.id == joint.id);
        if same {
            let rest = whole.split_off(before);
            return Ok((prompt, rest, false));
        }
        Ok((prompt, self.encode_behind(text, border)?, true))
    }

    /// Tokens of the text behind a border, on their own.
    fn encode_behind(&self, text: &str, border: usize) -> Result<Vec<TokenSpan>> {
        // Tokenizers of the SentencePiece kind put a space before the first word of a text. A newline in front, whose tokens
        // are dropped, takes that place; where it grows into the text, the text is tokenised without it.
        let led = self.tokenizer.encode_with_offsets(&format!("\n{}", &text[border..]))?;
        let lead = led.iter().take_while(|token| token.bytes.start < 1).count();
        let (tokens, shift) = if led[..lead].iter().all(|token| token.bytes.end <= 1) {
            (led[lead..].to_vec(), 1)
        } else {
            (self.tokenizer.encode_with_offsets(&text[border..])?, 0)
        };
        let place = |at: usize| (at + border).saturating_sub(shift);
        let moved =
            |token: TokenSpan| TokenSpan { id: token.id, bytes: place(token.bytes.start)..place(token.bytes.end) };
        Ok(tokens.into_iter().map(moved).collect())
    }

    /// A target ends with the first end token behind the answer's text. Without one it is the whole turn.
    fn end_of_target(&self, tokens: &[TokenSpan], turn: &Turn) -> usize {
        tokens
            .iter()
            .skip_while(|token| token.bytes.start < turn.content_end)
            .take_while(|token| token.bytes.start < turn.limit)
            .find(|token| self.is_end(token.id))
            .map_or(turn.limit, |token| token.bytes.end)
    }

    fn is_end(&self, id: i64) -> bool {
        self.tokenizer.is_special(id) || self.tokenizer.end_ids().contains(&id)
    }
}

/// A prompt as text and tokens, and where the content of one message lies in it.
pub(super) struct PromptAndContent {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenSpan>,
    pub(super) content: Option<Range<usize>>,
}

/// Where an answer lies in a rendered conversation, in bytes.
struct Turn {
    /// The end of the generation prompt.
    start: usize,
    /// The end of the answer's own text.
    content_end: usize,
    /// The end of the turn.
    limit: usize,
}

/// A token that reaches into a target is one; so is it with the user's text.
fn label(tokens: &[TokenSpan], targets: &[Range<usize>], users: &[Range<usize>]) -> Result<Tokens> {
    let touches = |token: &TokenSpan, spans: &[Range<usize>]| {
        let end = token.bytes.end.max(token.bytes.start + 1);
        spans.iter().any(|span| token.bytes.start < span.end && span.start < end)
    };
    let kind = |token: &TokenSpan| match () {
        () if touches(token, targets) => TokenKind::Target,
        () if touches(token, users) => TokenKind::User,
        () => TokenKind::Template,
    };
    Tokens::new(tokens.iter().map(|token| token.id).collect(), tokens.iter().map(kind).collect())
}

/// How many bytes two texts begin with in common, up to a whole character.
fn common_prefix(left: &str, right: &str) -> usize {
    let same = left.chars().zip(right.chars()).take_while(|(left, right)| left == right);
    same.map(|(character, _)| character.len_utf8()).sum()
}

fn roles(messages: &[Message]) -> String {
    if messages.is_empty() {
        return "no message".to_string();
    }
    let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
    roles.join(", ")
}

#[cfg(test)]
#[path = "chat_format_tests.rs"]
mod tests;
