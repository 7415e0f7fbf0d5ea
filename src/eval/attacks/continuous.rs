//! The embedding attack as one of the attacks of an evaluation.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch, attack_alone},
    requirements::{can_be_asked, has_a_target},
};
use crate::{
    AttackSettings, AttackedRow, Case, Continuation, ContinuationKind, EmbeddingAttack, Error, Example, Generation,
    Measurement, Message, Pgd, Region, Result, StringPlace, Subject, TokenKind, Tokens, attack_examples,
};

/// How a prompt's embeddings are attacked.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `name` | | the attack's name in a report | a text |
/// | `attack` | | [`Pgd`]: how to search, and how far | on harmful rows |
/// | `around` | | [`AttackSettings`]: starts, restarts, and which iterate counts | no warm start |
/// | `suffix` | none | a string put behind the behaviour, which alone is perturbed | at least one token |
/// | `seed` | | decides every random start, with the case's id | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContinuousSettings {
    /// The attack's name in a report.
    pub name: String,
    /// How to search, and how far.
    pub attack: Pgd,
    /// Starts, restarts, and which iterate counts.
    pub around: AttackSettings,
    /// A string put behind the behaviour, which alone is perturbed; without, what the threat set says of the prompt
    /// itself.
    #[serde(skip_serializing_if = "Option::is_none")]
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
        if self.name.trim().is_empty() {
            return Err(Error::setting("embedding.name", format!("{:?}", self.name), "a text"));
        }
        let inside = |error: Error| {
            error.with_field(|field| format!("embedding.{}", field.replacen("attack_settings", "around", 1)))
        };
        self.attack.validate().map_err(inside)?;
        self.around.validate().map_err(inside)?;
        self.around.check_restarts(&self.attack).map_err(inside)?;
        if self.attack.threat.rows != ContinuationKind::Harmful {
            let rows = format!("{:?}", self.attack.threat.rows);
            return Err(Error::setting(
                "embedding.attack.threat.rows",
                rows,
                "harmful: the target is what is attacked",
            ));
        }
        if self.around.warm_start {
            return Err(Error::setting("embedding.around.warm_start", true, "false: each case is attacked once"));
        }
        match &self.suffix {
            Some(suffix) if suffix.trim().is_empty() => {
                Err(Error::setting("embedding.suffix", format!("{suffix:?}"), "a text of at least one token"))
            }
            _ => Ok(()),
        }
    }
}

/// Perturbs embeddings so that the target becomes likely, then lets the model answer the perturbed prompt with its
/// likeliest tokens.
///
/// The one attempt has the target's loss under the perturbation; [`attack_examples`] gives it without one too.
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

    /// What is attacked of a case: a prompt with its target, and the conversation that it is of.
    fn asked(&self, subject: &Subject, case: &Case) -> Result<(Example, Vec<Message>)> {
        has_a_target(case)?;
        can_be_asked(subject, case)?;
        let (prompt, messages) = self.prompt(subject, case)?;
        subject.check(&messages)?;
        let tokens = subject.format().opening(&messages, &case.target)?.continuation;
        let target = Continuation { kind: ContinuationKind::Harmful, tokens };
        Ok((Example::new(&case.id, prompt, vec![target])?, messages))
    }

    fn measurement(&self, subject: &Subject, rows: usize) -> Measurement {
        Measurement {
            attack: self.settings.around.clone(),
            seed: self.settings.seed,
            rows,
            generation: Some(Generation { sampling: None, ..subject.generation().clone() }),
            keep_perturbations: false,
        }
    }
}

/// Passes of a measurement outside the attack: the losses without perturbation, and those under the one found.
const MEASURING: usize = 2;

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
        attack_alone(self, subject, case, watch)
    }

    fn at_once(&self, subject: &Subject) -> usize {
        subject.rows()
    }

    fn attack_together(&mut self, subject: &Subject, cases: &[Case], watch: &mut Watch) -> Result<Vec<Outcome>> {
        let begin = Instant::now();
        if watch(0, 1).is_break() {
            return Ok(vec![Outcome::Stopped; cases.len()]);
        }
        let asked = cases.iter().map(|case| self.asked(subject, case));
        let (examples, conversations): (Vec<_>, Vec<_>) = asked.collect::<Result<_>>()?;
        let mut attack = self.settings.attack.clone();
        let found = attack_examples(subject.model(), &examples, &mut attack, &self.measurement(subject, cases.len()))?;
        if found.rows.len() != cases.len() {
            return Err(Error::mismatch("attacked rows", cases.len(), found.rows.len()));
        }
        // Every case is in every pass.
        let forward_passes = found.statistics.forward_passes as usize + MEASURING;
        let cost = Cost {
            forward_passes,
            backward_passes: found.statistics.backward_passes as usize,
            answers: 1,
            seconds: begin.elapsed().as_secs_f64() / cases.len() as f64,
            ..Cost::default()
        };
        let outcome = |((example, messages), row): ((&Example, Vec<Message>), AttackedRow)| {
            let answer = subject.format().tokenizer().decode(&row.answer, true)?;
            let losses = vec![row.clean_loss(), row.attacked_loss()];
            let attempt =
                Attempt { step: self.settings.attack.steps, stream: 0, messages, loss: losses.last().copied(), answer };
            let cost = Cost { tokens: forward_passes * example.len(), ..cost };
            Ok(Outcome::Done(Trajectory { attempts: vec![attempt], offered: 0, losses, cost }))
        };
        examples.iter().zip(conversations).zip(found.rows).map(outcome).collect()
    }
}
