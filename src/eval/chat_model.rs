//! Chat models that help an evaluation: attackers, judges, rephrasers.

use std::{ops::Deref, path::Path};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::answers::answers;
use crate::{CausalLm, ChatFormat, Decoder, Error, Generation, Message, Result, Sampling};

/// A chat model that replies to conversations: [`LocalChat`] or [`super::Endpoint`].
pub trait ChatModel {
    /// The model in reports and in names of judges.
    fn name(&self) -> String;

    /// Texts that the model would take for the frame of a conversation and not for what is said in it, its special tokens:
    /// kept out of what others wrote.
    fn marks(&self) -> Vec<String> {
        Vec::new()
    }

    /// One reply per conversation, in order. That one conversation gets none is its [`ChatFailure`]; an error means that no other would get
    /// one either.
    ///
    /// # Errors
    /// Whatever keeps the model from working at all.
    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>>;
}

impl<M: ChatModel + ?Sized> ChatModel for Box<M> {
    fn name(&self) -> String {
        (**self).name()
    }
    fn marks(&self) -> Vec<String> {
        (**self).marks()
    }
    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        (**self).replies(conversations, settings)
    }
}

/// What a conversation got.
pub type Reply = std::result::Result<String, ChatFailure>;

/// Why a conversation got no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no reply: {0}")]
pub struct ChatFailure(pub String);

/// How replies are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplySettings {
    /// Longest reply, in tokens.
    pub max_new_tokens: usize,
    /// 0: the likeliest tokens.
    pub temperature: f64,
    /// Only the likeliest tokens whose probabilities add up to this are drawn; in (0, 1].
    pub top_p: f64,
    /// Decides a local model's draws; an endpoint is told.
    pub seed: u64,
}

impl ReplySettings {
    /// The likeliest tokens.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// A model in this process.
pub struct LocalChat<'a> {
    name: String,
    model: Held<'a, dyn CausalLm + 'a>,
    format: Held<'a, ChatFormat>,
    rows: usize,
}

enum Held<'a, T: ?Sized> {
    Lent(&'a T),
    Own(Box<T>),
}

impl<T: ?Sized> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Lent(held) => held,
            Self::Own(held) => held,
        }
    }
}

impl std::fmt::Debug for LocalChat<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalChat").field("name", &self.name).field("rows", &self.rows).finish_non_exhaustive()
    }
}

impl<'a> LocalChat<'a> {
    /// `rows` conversations are answered together: what memory allows.
    ///
    /// # Errors
    /// If `rows` is 0.
    pub fn new(name: impl Into<String>, model: &'a dyn CausalLm, format: &'a ChatFormat, rows: usize) -> Result<Self> {
        check_rows(rows)?;
        Ok(Self { name: name.into(), model: Held::Lent(model), format: Held::Lent(format), rows })
    }

    /// A model folder, whose name is the model's.
    ///
    /// # Errors
    /// As [`Decoder::load`] and [`ChatFormat::load`]; if `rows` is 0.
    pub fn load(folder: impl AsRef<Path>, kind: Kind, device: Device, rows: usize) -> Result<Self> {
        check_rows(rows)?;
        let folder = folder.as_ref();
        let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        let format = Held::Own(Box::new(ChatFormat::load(folder)?));
        Ok(Self { name, model: Held::Own(Box::new(Decoder::load(folder, kind, device)?)), format, rows })
    }
}

fn check_rows(rows: usize) -> Result<()> {
    if rows == 0 { Err(Error::setting("rows", 0, "at least 1")) } else { Ok(()) }
}

impl ChatModel for LocalChat<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn marks(&self) -> Vec<String> {
        self.format.tokenizer().added_texts()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        let ReplySettings { max_new_tokens, temperature, top_p, seed } = *settings;
        let sampling = (temperature > 0.0).then_some(Sampling { temperature, top_p, top_k: 0, seed });
        let generation = Generation { max_new_tokens, end_ids: self.format.end_ids(), sampling };
        // A conversation that the template refuses gets no reply; the others do.
        let refused = |messages: &Vec<Message>| self.format.prompt(messages).err().map(|error| error.to_string());
        let refused: Vec<Option<String>> = conversations.iter().map(refused).collect();
        let taken = conversations.iter().zip(&refused).filter(|(_, refused)| refused.is_none());
        let taken: Vec<Vec<Message>> = taken.map(|(messages, _)| messages.clone()).collect();
        let mut said = answers(&*self.model, &self.format, &taken, &generation, self.rows)?.into_iter();
        let reply = |refused: Option<String>| match refused {
            Some(why) => Err(ChatFailure(why)),
            None => said.next().ok_or_else(|| ChatFailure("the model gave none".into())),
        };
        Ok(refused.into_iter().map(reply).collect())
    }
}
