//! GCG as an evaluation (Zou et al. 2023).

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    answers::target_losses,
    case::{Case, Subject},
    completions::TestCases,
    prompt_attack::{Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
    refusal::complies,
};
use crate::{
    CausalLm, ChatFormat, Continuation, ContinuationKind, Draft, Error, Example, PlacedString, Positions,
    ProbeSampling, Result, SearchPrompt, StringPlace, TokenSearch, TokenSearchSettings, digest::generator,
};

/// How GCG looks for a suffix.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `steps` | 250 | gradient steps | at least 1 |
/// | `start` | `" x"`, 20 times | what the search begins at; it follows the behaviour | at least one token |
/// | `search` | [`TokenSearchSettings`] | how candidates are drawn and judged | |
/// | `ascii_only` | true | tokens of other letters are not used | |
/// | `check_every` | 50 | so often the model is asked with the best string so far, and at the end | at least 1 |
/// | `stop` | `never` | before all steps are done | |
/// | `seed` | 0 | decides every candidate, with the case's id | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcgSettings {
    /// Gradient steps.
    pub steps: usize,
    /// What the search begins at.
    pub start: String,
    /// How candidates are drawn and judged.
    pub search: TokenSearchSettings,
    /// Whether tokens of other letters are left out.
    pub ascii_only: bool,
    /// So often the model is asked.
    pub check_every: usize,
    /// When to stop early.
    pub stop: GcgStop,
    /// Decides every candidate.
    pub seed: u64,
}

/// When GCG stops before all its steps are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GcgStop {
    /// Never.
    #[default]
    Never,
    /// Once the model's likeliest tokens are the target (nanoGCG's `early_stop`).
    SaysTarget,
    /// Once the loss is at most this and a checked answer does not refuse (HarmBench).
    NotRefused {
        /// In nats per token.
        loss: f64,
    },
}

impl Default for GcgSettings {
    fn default() -> Self {
        Self::nanogcg()
    }
}

impl GcgSettings {
    /// The defaults of nanoGCG 0.3.0. It puts the string right behind the behaviour; here a space is between them, as in HarmBench.
    pub fn nanogcg() -> Self {
        Self {
            steps: 250,
            start: " x".repeat(20),
            search: TokenSearchSettings::default(),
            ascii_only: true,
            check_every: 50,
            stop: GcgStop::Never,
            seed: 0,
        }
    }

    /// HarmBench's settings.
    pub fn harmbench() -> Self {
        Self {
            steps: 500,
            start: " !".repeat(20),
            search: TokenSearchSettings { positions: Positions::Spread, ..TokenSearchSettings::default() },
            stop: GcgStop::NotRefused { loss: 0.05 },
            ..Self::nanogcg()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("steps", self.steps), ("check_every", self.check_every)] {
            if value == 0 {
                return Err(Error::setting(format!("gcg.{name}"), 0, "at least 1"));
            }
        }
        if self.start.trim().is_empty() {
            return Err(Error::setting("gcg.start", format!("{:?}", self.start), "a text of at least one token"));
        }
        self.search.validate()
    }
}

/// Greedy coordinate gradient: a suffix for each case, or one for several ([`Gcg::universal`]).
pub struct Gcg<'a> {
    settings: GcgSettings,
    draft: Option<DraftModel<'a>>,
}

/// A cheaper model that chooses candidates.
struct DraftModel<'a> {
    name: String,
    model: &'a dyn CausalLm,
    format: &'a ChatFormat,
    probe: ProbeSampling,
}

impl std::fmt::Debug for Gcg<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gcg").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// One suffix for several cases.
#[derive(Clone, Debug, PartialEq)]
pub struct UniversalSuffix {
    /// What follows each behaviour.
    pub suffix: String,
    /// What the search drove down, the mean over the cases, after each step.
    pub losses: Vec<f64>,
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

    /// Looks for one suffix for all of these cases; `None` if it was stopped.
    ///
    /// # Errors
    /// If there is no case, or the search fails.
    pub fn universal(&self, subject: &Subject, cases: &[Case], watch: &mut Watch) -> Result<Option<UniversalSuffix>> {
        let begin = Instant::now();
        let places = self.places(subject, cases)?;
        let mut search = self.search(subject, cases, &places, "universal")?;
        let mut losses = vec![search.best().loss];
        for step in 0..self.settings.steps {
            if watch(step, self.settings.steps).is_break() {
                return Ok(None);
            }
            losses.push(search.step()?.found.loss);
        }
        let suffix = self.string(subject, &places[0], &search)?;
        Ok(Some(UniversalSuffix { suffix, losses, cost: Cost::of_search(&search.cost(), 0, begin) }))
    }

    fn places(&self, subject: &Subject, cases: &[Case]) -> Result<Vec<(StringPlace, PlacedString)>> {
        let place = |case: &Case| {
            let place = StringPlace::new(case.messages.clone(), "")?;
            let placed = place.encode(subject.format(), &self.settings.start)?;
            Ok((place, placed))
        };
        cases.iter().map(place).collect()
    }

    /// A search for a string in these places; `name` decides its draws.
    fn search<'s>(
        &'s self,
        subject: &'s Subject,
        cases: &'s [Case],
        places: &'s [(StringPlace, PlacedString)],
        name: &str,
    ) -> Result<TokenSearch<'s>> {
        let (settings, format) = (&self.settings, subject.format());
        let prompt = |(case, (place, placed)): (&Case, &(StringPlace, PlacedString))| {
            let opening = format.opening(&place.messages(&settings.start), &case.target)?;
            let target = opening.continuation.ids().to_vec();
            Ok(SearchPrompt { before: placed.before.clone(), behind: placed.behind.clone(), target })
        };
        let prompts = cases.iter().zip(places).map(prompt).collect::<Result<Vec<_>>>()?;
        let Some((_, first)) = places.first() else {
            return Err(Error::mismatch("cases of a search", "at least one", 0));
        };
        let reads_back = move |ids: &[i64]| -> Result<bool> {
            for (place, placed) in places {
                if place.string_of(format, placed, ids)?.is_none() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let search = TokenSearch::new(
            subject.model(),
            &prompts,
            std::slice::from_ref(&first.string),
            &subject.searchable_ids(settings.ascii_only)?,
            settings.search.clone(),
            generator(settings.seed, "gcg", name),
            Box::new(reads_back),
        )?;
        let Some(draft) = &self.draft else { return Ok(search) };
        let strings = move |ids: &[i64]| places[0].0.string_of(format, &places[0].1, ids);
        let judge = DraftJudge { draft, cases, places, strings, rows: subject.rows() };
        search.with_draft(judge, draft.probe.clone())
    }

    /// The best string so far.
    fn string(
        &self,
        subject: &Subject,
        (place, placed): &(StringPlace, PlacedString),
        search: &TokenSearch,
    ) -> Result<String> {
        let string = place.string_of(subject.format(), placed, &search.best().ids)?;
        // The start is read as it is, whatever its tokens would be read as.
        Ok(string.unwrap_or_else(|| self.settings.start.clone()))
    }

    fn stops(&self, search: &mut TokenSearch, checked: Option<&Attempt>) -> Result<bool> {
        match self.settings.stop {
            GcgStop::Never => Ok(false),
            GcgStop::SaysTarget => search.says_target(),
            GcgStop::NotRefused { loss } => {
                Ok(search.best().loss <= loss && checked.is_some_and(|attempt| complies(&attempt.answer)))
            }
        }
    }
}

/// The draft model's losses of the attacked model's candidates.
struct DraftJudge<'s, 'a, F> {
    draft: &'s DraftModel<'a>,
    cases: &'s [Case],
    places: &'s [(StringPlace, PlacedString)],
    strings: F,
    rows: usize,
}

impl<F: Fn(&[i64]) -> Result<Option<String>>> Draft for DraftJudge<'_, '_, F> {
    fn losses(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<f64>> {
        let DraftModel { model, format, .. } = *self.draft;
        let mut sums = vec![0.0; candidates.len()];
        for (case, (place, _)) in self.cases.iter().zip(self.places) {
            let example = |ids: &Vec<i64>| {
                let string = (self.strings)(ids)?.unwrap_or_default();
                let opening = format.opening(&place.messages(&string), &case.target)?;
                let target = Continuation { kind: ContinuationKind::Harmful, tokens: opening.continuation };
                Example::new(&case.id, opening.prompt, vec![target])
            };
            let examples = candidates.iter().map(example).collect::<Result<Vec<_>>>()?;
            let losses = target_losses(model, &examples, ContinuationKind::Harmful, self.rows)?;
            sums.iter_mut().zip(losses).for_each(|(sum, losses)| *sum += losses.mean().unwrap_or(f64::INFINITY));
        }
        Ok(sums)
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
        let begin = Instant::now();
        let settings = &self.settings;
        let cases = std::slice::from_ref(case);
        let places = self.places(subject, cases)?;
        let mut search = self.search(subject, cases, &places, &case.id)?;
        let ask = |search: &TokenSearch, step| -> Result<Attempt> {
            let messages = places[0].0.messages(&self.string(subject, &places[0], search)?);
            let answer = subject.answers(std::slice::from_ref(&messages))?.concat();
            Ok(Attempt { step, stream: 0, messages, loss: Some(search.best().loss), answer })
        };
        let mut trajectory = Trajectory { attempts: vec![ask(&search, 0)?], ..Trajectory::default() };
        trajectory.losses.push(search.best().loss);
        for step in 1..=settings.steps {
            if watch(step - 1, settings.steps).is_break() {
                return Ok(Outcome::Stopped);
            }
            trajectory.losses.push(search.step()?.found.loss);
            let checked = step % settings.check_every == 0 || step == settings.steps;
            if checked {
                trajectory.attempts.push(ask(&search, step)?);
            }
            let stops = self.stops(&mut search, trajectory.attempts.last().filter(|_| checked))?;
            if stops && !checked {
                trajectory.attempts.push(ask(&search, step)?);
            }
            if stops {
                break;
            }
        }
        trajectory.offered = trajectory.attempts.len() - 1;
        trajectory.cost = Cost::of_search(&search.cost(), trajectory.attempts.len(), begin);
        Ok(Outcome::Done(trajectory))
    }
}
