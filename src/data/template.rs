//! Chat templates: conversations to text, byte for byte as transformers renders them.

use std::{
    collections::HashSet,
    fmt, iter,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    Date, SpecialTokens, marks,
    message::Message,
    special_tokens::read_json,
    template_engine::{Engine, Refusal, messages_value},
};
use crate::{Error, ErrorKind, Result, digest::hex, files};

const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The hand-written templates of the paper, for users and assistants alone (Zephyr and Phi-3: a system prompt as well).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplatePreset {
    /// `<bos><start_of_turn>user\n{x}<end_of_turn>\n<start_of_turn>model\n{y}<end_of_turn>\n`
    Gemma,
    /// `<s><|user|>\n{x}</s>\n<|assistant|>\n{y}</s>`
    Zephyr,
    /// `<s>[INST] {x} [/INST] {y} </s>`
    Mistral,
    /// `<s><|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n{x}<|end|>\n<|assistant|>\n{y}<|end|>\n`
    #[serde(rename = "phi-3")]
    Phi3,
}

impl TemplatePreset {
    /// The template as Jinja text.
    pub fn source(self) -> &'static str {
        match self {
            Self::Gemma => include_str!("presets/gemma.jinja"),
            Self::Zephyr => include_str!("presets/zephyr.jinja"),
            Self::Mistral => include_str!("presets/mistral.jinja"),
            Self::Phi3 => include_str!("presets/phi3.jinja"),
        }
    }
}

/// A Jinja chat template with the special tokens that it may print.
#[derive(Clone)]
pub struct ChatTemplate {
    source: String,
    /// The file, or what the template is in words: named in errors.
    origin: PathBuf,
    engine: Engine,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("origin", &self.origin).field("source", &self.source).finish()
    }
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json` (a text,
    /// or a list of named ones of which `default` is taken).
    ///
    /// # Errors
    /// If the folder has no template, a file cannot be read, or the template is not Jinja.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let special = SpecialTokens::load(folder)?;
        let path = folder.join(TEMPLATE_FILE);
        if path.exists() {
            return Self::compile(files::read_text(&path)?, path, special);
        }
        let path = folder.join("tokenizer_config.json");
        let config = read_json(&path)?.unwrap_or_default();
        let source = default_template(&path, config.get("chat_template"))?;
        Self::compile(source, path, special)
    }

    /// A template given as Jinja text.
    ///
    /// # Errors
    /// If it is not Jinja.
    pub fn from_source(source: impl Into<String>, special: &SpecialTokens) -> Result<Self> {
        Self::compile(source.into(), PathBuf::from("chat template given as text"), special.clone())
    }

    /// One of the paper's templates.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn preset(preset: TemplatePreset) -> Result<Self> {
        let origin = PathBuf::from(format!("chat template preset {preset:?}"));
        Self::compile(preset.source().to_string(), origin, SpecialTokens::default())
    }

    fn compile(source: String, origin: PathBuf, special: SpecialTokens) -> Result<Self> {
        let engine = Engine::new(&source, special).map_err(|error| engine_error(&origin, &error))?;
        Ok(Self { source, origin, engine })
    }

    /// The Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// SHA-256 of the Jinja text, in hexadecimal: for cache keys and reports.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.source.as_bytes()))
    }

    /// Whether the template marks what is generated with `{% generation %}` tags.
    pub fn has_generation_tags(&self) -> bool {
        self.engine.has_generation_tags
    }

    /// The same template, printing another date where it asks for today's.
    #[must_use]
    pub fn with_date(self, date: Date) -> Self {
        Self { engine: self.engine.with_date(date), ..self }
    }

    /// The date that the template prints where it asks for today's: unless set, that of the day on which it was loaded, in
    /// UTC. A run that is to be repeated or resumed keeps it.
    pub fn date(&self) -> Date {
        self.engine.date
    }

    /// Whether the template asks for the date anywhere (Llama 3.2's does), so that what it prints depends on
    /// [`ChatTemplate::date`].
    pub fn uses_clock(&self) -> bool {
        self.engine.uses_clock()
    }

    /// Writes the template as `chat_template.jinja` into a folder, made if it is not there.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        files::write(&folder.as_ref().join(TEMPLATE_FILE), self.source.as_bytes())
    }

    /// The text of a conversation; `add_generation_prompt` adds the header of the answer to come. `strftime_now` is midnight
    /// of [`ChatTemplate::date`], so that the same conversation always gives the same text.
    ///
    /// # Errors
    /// If the template refuses the conversation, or uses something that the Jinja engine does not have.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_marked(messages, add_generation_prompt, "", "")
    }

    /// As [`ChatTemplate::render`], with the byte range of each text that stood in generation tags.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with_generation(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let mut free = marks::unused_characters(self.texts(messages));
        let (Some(open), Some(close)) = (free.next(), free.next()) else {
            return Err(self.error("the conversation uses up all private-use characters"));
        };
        let marked = self.render_marked(
            messages,
            add_generation_prompt,
            open.encode_utf8(&mut [0; 4]),
            close.encode_utf8(&mut [0; 4]),
        )?;
        let (text, places) = marks::strip(&marked, &HashSet::from([open, close]));
        Ok((text, pair_spans(&places, open)))
    }

    pub(super) fn render_marked(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        open: &str,
        close: &str,
    ) -> Result<String> {
        self.engine
            .render(messages_value(messages), add_generation_prompt, open, close)
            .map_err(|error| engine_error(&self.origin, &error))
    }

    /// All texts that can end up in a rendered conversation.
    pub(super) fn texts<'a>(&'a self, messages: &'a [Message]) -> impl Iterator<Item = &'a str> {
        let contents = messages.iter().flat_map(|message| [message.role.as_str(), message.content.as_str()]);
        iter::once(self.source.as_str()).chain(contents)
    }

    /// That the template does not take a conversation.
    pub(super) fn error(&self, message: impl Into<String>) -> Error {
        ErrorKind::Conversation { template: self.origin.clone(), message: message.into() }.into()
    }
}

/// Marks come in pairs: a filter writes both or none.
fn pair_spans(places: &[(char, usize)], open: char) -> Vec<Range<usize>> {
    let of = |wanted: bool| places.iter().filter(move |(mark, _)| (*mark == open) == wanted).map(|(_, at)| *at);
    of(true).zip(of(false)).map(|(start, end)| start..end).collect()
}

fn default_template(path: &Path, value: Option<&Value>) -> Result<String> {
    let named =
        |entry: &Value| Some((entry.get("name")?.as_str()?.to_string(), entry.get("template")?.as_str()?.to_string()));
    match value {
        Some(Value::String(source)) => Ok(source.clone()),
        Some(Value::Array(entries)) => {
            let Some(entries) = entries.iter().map(named).collect::<Option<Vec<_>>>() else {
                return Err(Error::file(
                    path,
                    "chat_template: every entry of the list must be {\"name\", \"template\"}",
                ));
            };
            let names = entries.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>().join(", ");
            let default = entries.into_iter().find(|(name, _)| name == "default");
            let missing = || Error::file(path, format!("chat_template: no entry is named default; found {names}"));
            default.map(|(_, source)| source).ok_or_else(missing)
        }
        None | Some(Value::Null) => {
            let message =
                format!("no chat_template here and no {TEMPLATE_FILE} beside it; give a preset or a Jinja text");
            Err(Error::file(path, message))
        }
        Some(other) => {
            Err(Error::file(path, format!("chat_template = {other}: must be a text or a list of named ones")))
        }
    }
}

fn engine_error(origin: &Path, error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let causes = iter::successors(std::error::Error::source(error), |cause| cause.source());
    if let Some(refusal) = causes.filter_map(|cause| cause.downcast_ref::<Refusal>()).next() {
        return ErrorKind::Conversation { template: origin.to_path_buf(), message: format!("{line}{refusal}") }.into();
    }
    let detail =
        error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Error::file(origin, format!("{line}{detail}{cause}"))
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
