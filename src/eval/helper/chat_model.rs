//! Chat models that help an evaluation: attackers, judges, rephrasers.

use std::{
    ops::Deref,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::guard::texts_around;
use crate::{
    CausalLm, ChatFormat, Decoder, Error, Example, Generation, Message, Result, Sampling, TokenKind, Tokens,
    eval::measuring::answers::answers_to,
};

/// A chat model that replies to conversations: [`LocalChat`] or [`super::Endpoint`].
pub trait ChatModel {
    /// The model in reports and in names of judges.
    fn name(&self) -> String;

    /// What else tells the model from others: what was made with its help is not gone on from with another's.
    fn settings(&self) -> Value {
        Value::Null
    }

    /// Texts that the model would take for the frame of a conversation and not for what is said in it, its special
    /// tokens among them: kept out of what others wrote.
    fn marks(&self) -> Vec<String> {
        Vec::new()
    }

    /// One reply per conversation, in order. That one conversation gets none is its [`ChatFailure`]; an error means
    /// that no other would get one either.
    ///
    /// # Errors
    /// Whatever keeps the model from working at all.
    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>>;

    /// How each text goes on, read as it is, without chat template: for models that were trained on a form of their
    /// own.
    ///
    /// # Errors
    /// As [`ChatModel::replies`]; unless overridden, that the model only replies to conversations.
    fn continuations(&mut self, texts: &[String], settings: &ReplySettings) -> Result<Vec<Reply>> {
        let _ = (texts, settings);
        let what = format!("chat model {:?}", self.name());
        Err(Error::mismatch(what, "one that continues plain texts", "one that only replies to conversations"))
    }
}

impl<M: ChatModel + ?Sized> ChatModel for Box<M> {
    fn name(&self) -> String {
        (**self).name()
    }
    fn settings(&self) -> Value {
        (**self).settings()
    }
    fn marks(&self) -> Vec<String> {
        (**self).marks()
    }
    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        (**self).replies(conversations, settings)
    }
    fn continuations(&mut self, texts: &[String], settings: &ReplySettings) -> Result<Vec<Reply>> {
        (**self).continuations(texts, settings)
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
    /// Decides the draws, with a conversation's place among those of a call.
    pub seed: u64,
}

impl ReplySettings {
    /// The likeliest tokens.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// The replies of a helping model, one for each conversation.
///
/// # Errors
/// As [`ChatModel::replies`]; if there is another number of them.
pub(crate) fn replies_of(
    model: &mut dyn ChatModel,
    conversations: &[Vec<Message>],
    settings: &ReplySettings,
) -> Result<Vec<Reply>> {
    let replies = model.replies(conversations, settings)?;
    counted(model, replies, conversations.len())
}

/// The same of [`ChatModel::continuations`].
pub(crate) fn continuations_of(
    model: &mut dyn ChatModel,
    texts: &[String],
    settings: &ReplySettings,
) -> Result<Vec<Reply>> {
    let replies = model.continuations(texts, settings)?;
    counted(model, replies, texts.len())
}

fn counted(model: &dyn ChatModel, replies: Vec<Reply>, expected: usize) -> Result<Vec<Reply>> {
    if replies.len() != expected {
        return Err(Error::mismatch(format!("replies of the model {:?}", model.name()), expected, replies.len()));
    }
    Ok(replies)
}

/// A helping model in an attack's settings.
pub(crate) fn identity(model: &dyn ChatModel) -> Value {
    json!({ "name": model.name(), "settings": model.settings() })
}

/// A model in this process.
pub struct LocalChat<'a> {
    name: String,
    model: Held<'a, dyn CausalLm + 'a>,
    format: Held<'a, ChatFormat>,
    marks: Vec<String>,
    folder: Option<PathBuf>,
    rows: usize,
    context: Option<usize>,
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
        Error::check_count("rows", rows)?;
        let (marks, name) = (texts_around(format), name.into());
        let (model, format) = (Held::Lent(model), Held::Lent(format));
        Ok(Self { name, model, format, marks, folder: None, rows, context: None })
    }

    /// A model folder, whose name is the model's. Conversations that are longer than the model was made for get no
    /// reply.
    ///
    /// # Errors
    /// As [`Decoder::load`] and [`ChatFormat::load`]; if `rows` is 0.
    pub fn load(folder: impl AsRef<Path>, kind: Kind, device: Device, rows: usize) -> Result<Self> {
        Error::check_count("rows", rows)?;
        let folder = folder.as_ref();
        let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        let format = ChatFormat::load(folder)?;
        let decoder = Decoder::load(folder, kind, device)?;
        Ok(Self {
            name,
            marks: texts_around(&format),
            context: Some(decoder.config().max_positions),
            model: Held::Own(Box::new(decoder)),
            format: Held::Own(Box::new(format)),
            folder: Some(folder.to_path_buf()),
            rows,
        })
    }

    /// Conversations that are longer with their replies than so many tokens get no reply.
    #[must_use]
    pub fn with_context(self, tokens: usize) -> Self {
        Self { context: Some(tokens), ..self }
    }

    /// A prompt, unless it is too long or the template refuses it.
    fn checked(&self, prompt: Result<Tokens>, reply: usize) -> std::result::Result<Tokens, ChatFailure> {
        let prompt = prompt.map_err(|error| ChatFailure(error.to_string()))?;
        match self.context {
            Some(most) if prompt.len() + reply > most => {
                let found = format!("{} tokens of the prompt and {reply} of the reply", prompt.len());
                Err(ChatFailure(format!("{found}: the model is made for at most {most}")))
            }
            _ => Ok(prompt),
        }
    }

    /// The ids of a text, behind the begin-of-sequence token where the chat template begins with it.
    fn plain(&self, text: &str) -> Result<Tokens> {
        let tokenizer = self.format.tokenizer();
        let first = self.format.prompt(&[Message::user("Hello")])?.ids().first().copied();
        let begin = tokenizer.bos_token().and_then(|token| tokenizer.id_of(token)).filter(|id| Some(*id) == first);
        let mut ids = tokenizer.encode(text)?;
        if let Some(begin) = begin.filter(|begin| ids.first() != Some(begin)) {
            ids.insert(0, begin);
        }
        Ok(Tokens::of_kind(ids, TokenKind::User))
    }

    fn said(&self, prompts: Vec<Result<Tokens>>, settings: &ReplySettings) -> Result<Vec<Reply>> {
        let ReplySettings { max_new_tokens, temperature, top_p, seed } = *settings;
        let sampling = (temperature > 0.0).then_some(Sampling { temperature, top_p, top_k: 0, seed });
        let generation = Generation { max_new_tokens, end_ids: self.format.end_ids(), sampling };
        let prompts: Vec<std::result::Result<Example, ChatFailure>> = (prompts.into_iter().enumerate())
            .map(|(place, prompt)| {
                let example =
                    Example::new(format!("prompt/{place}"), self.checked(prompt, max_new_tokens)?, Vec::new());
                example.map_err(|error| ChatFailure(error.to_string()))
            })
            .collect();
        let taken: Vec<Example> = prompts.iter().filter_map(|prompt| prompt.as_ref().ok().cloned()).collect();
        let mut said = Vec::with_capacity(taken.len());
        for rows in taken.chunks(self.rows) {
            said.extend(answers_to(&*self.model, &self.format, rows.to_vec(), &generation)?);
        }
        let mut said = said.into_iter();
        let mut next = || said.next().ok_or_else(|| ChatFailure("the model gave none".into()));
        Ok(prompts.into_iter().map(|prompt| prompt.and_then(|_| next())).collect())
    }
}

impl ChatModel for LocalChat<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "folder": self.folder, "dtype": format!("{:?}", self.model.kind()).to_lowercase() })
    }

    fn marks(&self) -> Vec<String> {
        self.marks.clone()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        self.said(conversations.iter().map(|messages| self.format.prompt(messages)).collect(), settings)
    }

    fn continuations(&mut self, texts: &[String], settings: &ReplySettings) -> Result<Vec<Reply>> {
        self.said(texts.iter().map(|text| self.plain(text)).collect(), settings)
    }
}
