//! The embedding attack as one of the attacks of an evaluation.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    case::{Case, Subject},
    embedding::{Measurement, attack_examples},
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
};
use crate::{
    AttackSettings, Continuation, ContinuationKind, Error, Example, Message, Pgd, Region, Result, StringPlace,
    TokenKind, Tokens,
};

/// How a prompt's embeddings are attacked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContinuousSettings {
    /// The attack's name in a report.
    pub name: String,
    /// How to search, and how far.
    pub attack: Pgd,
    /// Starts, restarts, and which iterate counts.
    pub around: AttackSettings,
    /// A string put behind the behaviour, which alone is perturbed; without, what the threat set says of the prompt itself.
    pub suffix: Option<String>,
    /// Decides every random start, with the case's id.
    pub seed: u64,
}

impl ContinuousSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.attack.threat.validate()?;
        self.around.validate()?;
        match &self.suffix {
            Some(suffix) if suffix.trim().is_empty() => {
                Err(Error::setting("embedding.suffix", format!("{suffix:?}"), "a text of at least one token"))
            }
            _ => Ok(()),
        }
    }
}

/// Perturbs embeddings so that the target becomes likely, then lets the model answer the perturbed prompt.
#[derive(Clone, Debug)]
pub struct Continuous {
    settings: ContinuousSettings,
}

impl Continuous {
    /// Checked.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(mut settings: ContinuousSettings) -> Result<Self> {
        settings.validate()?;
        if settings.suffix.is_some() {
            // The suffix alone is labelled as the user's.
            settings.attack.threat.region = Region::UserContent;
        }
        Ok(Self { settings })
    }

    /// The prompt, its perturbed tokens being of the user, and the conversation that it is of.
    fn prompt(&self, subject: &Subject, case: &Case) -> Result<(Tokens, Vec<Message>)> {
        let Some(suffix) = &self.settings.suffix else {
            return Ok((subject.format().prompt(&case.messages)?, case.messages.clone()));
        };
        let place = StringPlace::new(case.messages.clone(), "")?;
        let placed = place.encode(subject.format(), suffix)?;
        let mut prompt = Tokens::of_kind(placed.before, TokenKind::Template);
        prompt.extend(&Tokens::of_kind(placed.string, TokenKind::User));
        prompt.extend(&Tokens::of_kind(placed.behind, TokenKind::Template));
        Ok((prompt, place.messages(suffix)))
    }
}

impl PromptAttack for Continuous {
    fn name(&self) -> String {
        self.settings.name.clone()
    }

    fn settings(&self) -> Value {
        json!(self.settings)
    }

    fn access(&self) -> Access {
        if self.settings.attack.threat.bounded { Access::Embeddings } else { Access::Unbounded }
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        let begin = Instant::now();
        if watch(0, 1).is_break() {
            return Ok(Outcome::Stopped);
        }
        let (prompt, messages) = self.prompt(subject, case)?;
        subject.check(&messages)?;
        let tokens = subject.format().opening(&messages, &case.target)?.continuation;
        let length = prompt.len() + tokens.len();
        let target = Continuation { kind: ContinuationKind::Harmful, tokens };
        let example = Example::new(&case.id, prompt, vec![target])?;
        let measurement = Measurement {
            attack: self.settings.around.clone(),
            seed: self.settings.seed,
            rows: 1,
            generation: Some(subject.generation().clone()),
            keep_perturbations: false,
        };
        let found = attack_examples(subject.model(), &[example], &mut self.settings.attack.clone(), &measurement)?;
        let Some(row) = found.rows.first() else {
            return Err(Error::mismatch("attacked rows", 1, 0));
        };
        let answer = subject.format().tokenizer().decode(&row.answer, true)?;
        let (clean, attacked) = (row.clean_loss(), row.attacked_loss());
        let passes = &found.statistics;
        let cost = Cost {
            forward_passes: passes.forward_passes as usize,
            backward_passes: passes.backward_passes as usize,
            tokens: passes.forward_passes as usize * length,
            answers: 1,
            seconds: begin.elapsed().as_secs_f64(),
            ..Cost::default()
        };
        let attempt = Attempt { step: self.settings.attack.steps, stream: 0, messages, loss: Some(attacked), answer };
        Ok(Outcome::Done(Trajectory { attempts: vec![attempt], offered: 0, losses: vec![clean, attacked], cost }))
    }
}
