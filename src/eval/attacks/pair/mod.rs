//! PAIR (Chao et al. 2023): an attacking model refines its prompts in a dialogue.

mod dialogue;
mod reply;
mod search;
mod settings;

use serde_json::{Value, json};

use self::search::Search;
pub use self::settings::PairSettings;
use super::{
    prompt_attack::{Outcome, PromptAttack, Watch},
    requirements::{can_be_asked, ends_with_a_request, has_a_target},
};
use crate::{Case, ChatModel, Judge, Result, Subject, eval::helper::chat_model::identity};

/// A dialogue between an attacking model, the attacked one, and a judge whose scores the attacker sees.
pub struct Pair<'a> {
    settings: PairSettings,
    attacker: Box<dyn ChatModel + 'a>,
    judge: Box<dyn Judge + 'a>,
}

impl std::fmt::Debug for Pair<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl<'a> Pair<'a> {
    /// The judge should give scores ([`crate::ScoreJudge`]); of one that does not, harmful counts as 10 and not harmful
    /// as 1.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(settings: PairSettings, attacker: impl ChatModel + 'a, judge: impl Judge + 'a) -> Result<Self> {
        settings.validate()?;
        Ok(Self { settings, attacker: Box::new(attacker), judge: Box::new(judge) })
    }
}

impl PromptAttack for Pair<'_> {
    fn name(&self) -> String {
        "pair".into()
    }

    fn settings(&self) -> Value {
        json!({
            "settings": self.settings,
            "attacker": identity(&*self.attacker),
            "judge": { "name": self.judge.name(), "settings": self.judge.settings() },
        })
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        has_a_target(case)?;
        ends_with_a_request(case)?;
        can_be_asked(subject, case)?;
        Search::new(self, subject, case).run(watch)
    }
}
