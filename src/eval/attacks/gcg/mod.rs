//! GCG as an evaluation (Zou et al. 2023).

mod draft;
mod places;
mod settings;

use std::{cell::Cell, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::settings::{GcgSettings, GcgStop};
use self::{
    draft::{DraftJudge, DraftModel},
    places::Places,
};
use super::{
    prompt_attack::{Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
    requirements::{can_be_asked, has_a_target},
};
use crate::{
    Case, CausalLm, ChatFormat, Message, ProbeSampling, Result, Subject, TestCases, TokenSearch, digest::generator,
    eval::measuring::refusal::complies,
};

/// Greedy coordinate gradient: a suffix for each case, or one for several ([`Gcg::universal`]).
pub struct Gcg<'a> {
    settings: GcgSettings,
    draft: Option<DraftModel<'a>>,
}

impl std::fmt::Debug for Gcg<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gcg").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// One suffix for several cases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UniversalSuffix {
    /// What follows each behaviour.
    pub suffix: String,
    /// What the search drove down, the mean over the cases: at its start and after each step; in the units
    /// of [`crate::FoundString::loss`].
    pub losses: Vec<f64>,
    /// Whether the search came to its end; if not, it was told to stop.
    pub completed: bool,
    /// What the search cost.
    pub cost: Cost,
}

impl UniversalSuffix {
    /// The prompts with it, for [`super::Replay`]: of the cases that it was found on, or of others.
    pub fn test_cases(&self, cases: &[Case]) -> TestCases {
        let prompt = |case: &Case| {
            let request = case.messages.last().map_or("", |last| last.content.as_str());
            vec![format!("{request}{}", self.suffix)]
        };
        cases.iter().map(|case| (case.id.clone(), prompt(case))).collect()
    }
}

/// What the model said behind the best string so far.
struct Check {
    step: usize,
    loss: f64,
    /// One for each case.
    conversations: Vec<Vec<Message>>,
    answers: Vec<String>,
}

/// What came of a search.
struct Found {
    checks: Vec<Check>,
    losses: Vec<f64>,
    /// The best string's.
    suffix: String,
    completed: bool,
    cost: Cost,
}

impl<'a> Gcg<'a> {
    /// Checked.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(settings: GcgSettings) -> Result<Self> {
        settings.validate()?;
        Ok(Self { settings, draft: None })
    }

    /// Lets a cheaper model, with a tokenizer and template of its own, choose which candidates are worth a pass.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn with_draft(
        self,
        name: impl Into<String>,
        model: &'a dyn CausalLm,
        format: &'a ChatFormat,
        probe: ProbeSampling,
    ) -> Result<Self> {
        probe.validate()?;
        Ok(Self { draft: Some(DraftModel { name: name.into(), model, format, probe }), ..self })
    }

    /// Looks for one suffix for all of these cases; it stops early where all of them have what the settings stop at. What was
    /// found so far is given where `watch` stops it.
    ///
    /// # Errors
    /// If there is no case, the start is not read as the same tokens behind all of them, or the search fails.
    pub fn universal(&self, subject: &Subject, cases: &[Case], watch: &mut Watch) -> Result<UniversalSuffix> {
        let Found { suffix, losses, completed, cost, .. } = self.run(subject, cases, "universal", watch)?;
        Ok(UniversalSuffix { suffix, losses, completed, cost })
    }

    /// A search to its end; `name` decides its draws.
    fn run(&self, subject: &Subject, cases: &[Case], name: &str, watch: &mut Watch) -> Result<Found> {
        let (begin, settings) = (Instant::now(), &self.settings);
        let places = Places::new(subject.format(), cases, &settings.start)?;
        let draft_passes = Cell::new(0);
        let mut search = self.search(subject, cases, &places, name, &draft_passes)?;
        let mut checks = vec![self.check(subject, &places, &search, 0)?];
        let mut losses = vec![search.best().loss];
        let mut completed = true;
        for step in 1..=settings.steps {
            if watch(step - 1, settings.steps).is_break() {
                completed = false;
                break;
            }
            losses.push(search.step()?.found.loss);
            let says_target = settings.stop == GcgStop::SaysTarget && search.says_target()?;
            let last = says_target || step == settings.steps;
            let asks = last || step % settings.check_every == 0;
            if asks {
                self.check_again(subject, &places, &search, step, &mut checks)?;
            }
            if says_target || (asks && self.is_not_refused(&search, &checks)) {
                break;
            }
        }
        let answers = checks.iter().map(|check| check.answers.len()).sum();
        let cost = Cost::of_search(&search.cost(), answers, begin);
        let cost = Cost { draft_passes: draft_passes.get(), ..cost };
        Ok(Found { checks, losses, suffix: self.suffix(&places, &search)?, completed, cost })
    }

    fn search<'s>(
        &'s self,
        subject: &'s Subject,
        cases: &'s [Case],
        places: &'s Places<'s>,
        name: &str,
        draft_passes: &'s Cell<usize>,
    ) -> Result<TokenSearch<'s>> {
        let settings = &self.settings;
        let mut random = generator(settings.seed, "gcg", name);
        let allowed = subject.searchable_ids(settings.ascii_only)?;
        let search = TokenSearch::new(
            subject.model(),
            &places.prompts(cases, &settings.start)?,
            &places.starts(settings.search.buffer, &allowed, &mut random)?,
            &allowed,
            settings.search.clone(),
            random,
            Box::new(|ids| Ok(places.string_of(ids)?.is_some())),
        )?;
        match &self.draft {
            None => Ok(search),
            Some(draft) => {
                let judge = DraftJudge { draft, cases, places, settings: &settings.search, passes: draft_passes };
                search.with_draft(judge, draft.probe.clone())
            }
        }
    }

    /// The best string so far.
    fn suffix(&self, places: &Places, search: &TokenSearch) -> Result<String> {
        // The start is read as it is, whatever its tokens would be read as.
        Ok(places.string_of(&search.best().ids)?.unwrap_or_else(|| self.settings.start.clone()))
    }

    fn check(&self, subject: &Subject, places: &Places, search: &TokenSearch, step: usize) -> Result<Check> {
        let conversations = places.messages(&self.suffix(places, search)?);
        let answers = subject.answers(&conversations)?;
        Ok(Check { step, loss: search.best().loss, conversations, answers })
    }

    /// Asks with the best string so far, unless it was asked with already.
    fn check_again(
        &self,
        subject: &Subject,
        places: &Places,
        search: &TokenSearch,
        step: usize,
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        if checks.last().is_none_or(|last| last.loss > search.best().loss) {
            checks.push(self.check(subject, places, search, step)?);
        }
        Ok(())
    }

    fn is_not_refused(&self, search: &TokenSearch, checks: &[Check]) -> bool {
        let GcgStop::NotRefused { loss } = self.settings.stop else { return false };
        let comply = |check: &Check| check.answers.iter().all(|answer| complies(answer));
        search.best().loss <= loss && checks.last().is_some_and(comply)
    }
}

impl PromptAttack for Gcg<'_> {
    fn name(&self) -> String {
        "gcg".into()
    }

    fn settings(&self) -> Value {
        match &self.draft {
            None => json!(self.settings),
            Some(draft) => json!({ "settings": self.settings, "draft": draft.name, "probe_sampling": draft.probe }),
        }
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        let cases = std::slice::from_ref(case);
        can_be_asked(subject, case)?;
        has_a_target(case)?;
        let Found { checks, losses, completed, cost, .. } = self.run(subject, cases, &case.id, watch)?;
        if !completed {
            return Ok(Outcome::Stopped);
        }
        let attempt = |Check { step, loss, conversations, answers }| {
            let (messages, answer) = (conversations.concat(), answers.concat());
            Attempt { step, stream: 0, messages, loss: Some(loss), answer }
        };
        let attempts: Vec<Attempt> = checks.into_iter().map(attempt).collect();
        Ok(Outcome::Done(Trajectory { offered: attempts.len() - 1, attempts, losses, cost }))
    }
}
