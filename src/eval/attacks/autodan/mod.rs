//! AutoDAN (Liu et al. 2023): a genetic search over readable texts that stand before the behaviour.

mod search;
mod settings;
mod text;
mod words;

use serde_json::{Value, json};

use self::search::Search;
pub use self::{settings::AutoDanSettings, words::Synonyms};
use super::{
    prompt_attack::{Outcome, PromptAttack, Watch},
    requirements::{can_be_asked, ends_with_a_request, has_a_target},
};
use crate::{Case, ChatModel, Error, Result, Subject, digest::bytes_digest, eval::helper::chat_model::identity, files};

/// A genetic search for a text before the behaviour.
///
/// In the hierarchical variant (AutoDAN-HGA) some generations are of words: the elites stay, and in each other text up
/// to five words give way to synonyms, the likelier the fitter the texts were that the synonym occurred in. Unlike Liu
/// et al.'s, they are drawn from all words that have synonyms and are not the text's first ones, a word that no text
/// has had yet is never put in, and the draw is by the softmax of the scores.
pub struct AutoDan<'a> {
    settings: AutoDanSettings,
    prefixes: Vec<String>,
    synonyms: Synonyms,
    rephraser: Option<Box<dyn ChatModel + 'a>>,
}

impl std::fmt::Debug for AutoDan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AutoDan").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl<'a> AutoDan<'a> {
    /// With the shipped synonyms, and with the shipped prefixes unless the settings name a file.
    ///
    /// # Errors
    /// If a setting is out of range, or the file cannot be read or holds no text.
    pub fn new(settings: AutoDanSettings) -> Result<Self> {
        settings.validate()?;
        let shipped = paragraphs(include_str!("prefixes.txt"));
        let attack = Self { prefixes: shipped, synonyms: Synonyms::shipped(), rephraser: None, settings };
        match attack.settings.prefixes.clone() {
            Some(path) => attack
                .with_prefixes(&files::read_text(&path)?)
                .map_err(|error| error.while_doing(format!("reading {}", path.display()))),
            None => Ok(attack),
        }
    }

    /// Begins at other texts: `text` holds them between empty lines.
    ///
    /// # Errors
    /// If it holds none.
    pub fn with_prefixes(self, text: &str) -> Result<Self> {
        let prefixes = paragraphs(text);
        if prefixes.is_empty() {
            return Err(Error::mismatch(
                "prefixes of AutoDAN",
                "at least one text, with empty lines between texts",
                "none",
            ));
        }
        Ok(Self { prefixes, ..self })
    }

    /// Other synonyms.
    #[must_use]
    pub fn with_synonyms(self, synonyms: Synonyms) -> Self {
        Self { synonyms, ..self }
    }

    /// Lets a model rephrase texts, in place of synonyms.
    #[must_use]
    pub fn with_rephraser(self, model: impl ChatModel + 'a) -> Self {
        Self { rephraser: Some(Box::new(model)), ..self }
    }
}

fn paragraphs(text: &str) -> Vec<String> {
    let text = text.replace("\r\n", "\n");
    text.split("\n\n").map(str::trim).filter(|text| !text.is_empty()).map(str::to_string).collect()
}

impl PromptAttack for AutoDan<'_> {
    fn name(&self) -> String {
        if self.settings.words_between > 0 { "autodan-hga".into() } else { "autodan".into() }
    }

    fn settings(&self) -> Value {
        json!({
            // What the file holds counts, and not where it lies.
            "settings": AutoDanSettings { prefixes: None, ..self.settings.clone() },
            "prefixes": bytes_digest(self.prefixes.join("\n\n").as_bytes()),
            "synonyms": self.synonyms.digest(),
            "rephraser": self.rephraser.as_ref().map(|model| identity(&**model)),
        })
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        has_a_target(case)?;
        ends_with_a_request(case)?;
        can_be_asked(subject, case)?;
        Search::new(self, subject, case).run(watch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_prefixes_can_cross_over() {
        let prefixes = paragraphs(include_str!("prefixes.txt"));
        assert_eq!(prefixes.len(), 16);
        assert!(prefixes.iter().all(|text| text::sentences(text).len() >= 4));
    }
}
