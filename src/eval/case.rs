//! What is attacked, and with what.

use std::cell::OnceCell;

use serde::{Deserialize, Serialize};

use crate::{Behavior, CausalLm, ChatFormat, Error, Generation, Message, Result, answers};

/// One behaviour that a model should refuse, and how an answer that complies begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Unique in an evaluation.
    pub id: String,
    /// What is asked for.
    pub behavior: String,
    /// A text that the request is about.
    pub context: Option<String>,
    /// How an answer that complies begins.
    pub target: String,
    /// The conversation that asks for it plainly: attacks change its last message.
    pub messages: Vec<Message>,
}

impl Case {
    /// A behaviour of HarmBench's with one of its targets.
    pub fn new(behavior: &Behavior, target: impl Into<String>) -> Self {
        Self {
            id: behavior.id.clone(),
            behavior: behavior.behavior.clone(),
            context: behavior.context.clone(),
            target: target.into(),
            messages: vec![Message::user(behavior.request())],
        }
    }
}

/// A model under evaluation and how it is asked.
pub struct Subject<'a> {
    model: &'a dyn CausalLm,
    format: &'a ChatFormat,
    generation: Generation,
    rows: usize,
    context: Option<usize>,
    ascii_ids: OnceCell<Vec<i64>>,
}

impl std::fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject")
            .field("generation", &self.generation)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl<'a> Subject<'a> {
    /// A model, its chat format, and how answers are made: `rows` of them together, what memory allows. A frozen model
    /// ([`CausalLm::frozen`]) is faster.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(model: &'a dyn CausalLm, format: &'a ChatFormat, generation: Generation, rows: usize) -> Result<Self> {
        generation.validate()?;
        Error::check_count("rows", rows)?;
        Ok(Self { model, format, generation, rows, context: None, ascii_ids: OnceCell::new() })
    }

    /// Refuses conversations that are longer with their answers than so many tokens, the longest text that the model was made for.
    #[must_use]
    pub fn with_context(self, tokens: usize) -> Self {
        Self { context: Some(tokens), ..self }
    }

    /// The model.
    pub fn model(&self) -> &'a dyn CausalLm {
        self.model
    }

    /// Its chat format.
    pub fn format(&self) -> &'a ChatFormat {
        self.format
    }

    /// How answers are made.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// How many texts are computed together.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The longest text, in tokens with its answer, where one was named.
    pub fn context(&self) -> Option<usize> {
        self.context
    }

    /// What the model says to each conversation.
    ///
    /// # Errors
    /// If a conversation cannot be rendered or is too long, or the model fails.
    pub fn answers(&self, conversations: &[Vec<Message>]) -> Result<Vec<String>> {
        conversations.iter().try_for_each(|messages| self.check(messages))?;
        answers(self.model, self.format, conversations, &self.generation, self.rows)
    }

    /// An error if a conversation cannot be rendered, or is longer with its answer than the model's context.
    ///
    /// # Errors
    /// Why it cannot be rendered, or the length and what is allowed.
    pub fn check(&self, messages: &[Message]) -> Result<()> {
        let (prompt, answer) = (self.format.prompt(messages)?.len(), self.generation.max_new_tokens);
        match self.context {
            Some(most) if prompt + answer > most => {
                let found = format!("{prompt} of the prompt and {answer} of the answer");
                Err(Error::mismatch("tokens of a conversation", format!("at most {most}"), found))
            }
            _ => Ok(()),
        }
    }

    /// An error if a text of so many tokens is longer than the model's context.
    ///
    /// # Errors
    /// The length and what is allowed.
    pub fn check_length(&self, tokens: usize) -> Result<()> {
        match self.context {
            Some(most) if tokens > most => Err(Error::mismatch("tokens of a text", format!("at most {most}"), tokens)),
            _ => Ok(()),
        }
    }

    /// The ids of printable tokens, of ASCII alone unless others are wanted: [`crate::Tokenizer::printable_ids`].
    ///
    /// # Errors
    /// If the tokenizer fails, or the model's vocabulary lacks them all.
    pub(super) fn searchable_ids(&self, ascii_only: bool) -> Result<Vec<i64>> {
        let vocabulary = self.model.vocabulary();
        let find = || -> Result<Vec<i64>> {
            let ids = self.format.tokenizer().printable_ids(ascii_only)?;
            let ids: Vec<i64> = ids.into_iter().filter(|id| *id < vocabulary).collect();
            if ids.is_empty() {
                return Err(Error::mismatch("tokens of a search for strings", "some that are printable", "none"));
            }
            Ok(ids)
        };
        if !ascii_only {
            return find();
        }
        match self.ascii_ids.get() {
            Some(ids) => Ok(ids.clone()),
            None => {
                let ids = find()?;
                Ok(self.ascii_ids.get_or_init(|| ids).clone())
            }
        }
    }
}
