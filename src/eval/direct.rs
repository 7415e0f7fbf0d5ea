//! The request as it is, and with the beginning of its answer given.

use std::{ops::ControlFlow, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    answers::answers_to,
    case::{Case, Subject},
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
};
use crate::{Error, Example, Result, Sampling};

/// How a plain request is asked.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `samples` | 1 | answers: the first as the subject answers, each further one drawn | at least 1 |
/// | `temperature` | 1 | of the drawn answers | above 0 |
/// | `prefill` | 0 | so many words of the target are put into the model's mouth | |
/// | `seed` | 0 | decides the drawn answers, with the case's id | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirectSettings {
    /// How many answers.
    pub samples: usize,
    /// Of the drawn answers.
    pub temperature: f64,
    /// Words of the target that the answer begins with.
    pub prefill: usize,
    /// Decides the drawn answers.
    pub seed: u64,
}

impl Default for DirectSettings {
    fn default() -> Self {
        Self { samples: 1, temperature: 1.0, prefill: 0, seed: 0 }
    }
}

impl DirectSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.samples == 0 {
            return Err(Error::setting("direct.samples", 0, "at least 1"));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::setting("direct.temperature", self.temperature, "above 0"));
        }
        Ok(())
    }
}

/// No attack, or the simplest: the plain request, several answers to it, or an answer whose beginning is given.
#[derive(Clone, Debug)]
pub struct Direct {
    settings: DirectSettings,
}

impl Direct {
    /// Checked.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn new(settings: DirectSettings) -> Result<Self> {
        settings.validate()?;
        Ok(Self { settings })
    }

    /// The first words of the target.
    fn given(&self, case: &Case) -> String {
        case.target.split_whitespace().take(self.settings.prefill).collect::<Vec<_>>().join(" ")
    }
}

impl PromptAttack for Direct {
    fn name(&self) -> String {
        if self.settings.prefill > 0 { "prefill".into() } else { "direct".into() }
    }

    fn settings(&self) -> Value {
        json!(self.settings)
    }

    fn access(&self) -> Access {
        if self.settings.prefill > 0 { Access::Answer } else { Access::Text }
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        let begin = Instant::now();
        subject.check(&case.messages)?;
        let given = self.given(case);
        let mut prompt = subject.format().prompt(&case.messages)?;
        if !given.is_empty() {
            let opening = subject.format().opening(&case.messages, &given)?;
            prompt = opening.prompt;
            prompt.extend_as_template(&opening.continuation);
        }
        let mut trajectory = Trajectory::default();
        for stream in 0..self.settings.samples {
            if let ControlFlow::Break(()) = watch(stream, self.settings.samples) {
                return Ok(Outcome::Stopped);
            }
            let mut generation = subject.generation().clone();
            if stream > 0 {
                let drawn = generation.sampling.unwrap_or_default();
                let (temperature, seed) = (self.settings.temperature, self.settings.seed);
                generation.sampling = Some(Sampling { temperature, seed, ..drawn });
            }
            let example = Example::new(format!("{}/{stream}", case.id), prompt.clone(), Vec::new())?;
            let said = answers_to(subject.model(), subject.format(), vec![example], &generation)?.concat();
            let answer = format!("{given}{said}");
            let messages = case.messages.clone();
            trajectory.attempts.push(Attempt { step: 0, stream, messages, loss: None, answer });
        }
        let seconds = begin.elapsed().as_secs_f64();
        trajectory.cost = Cost { answers: trajectory.attempts.len(), seconds, ..Cost::default() };
        Ok(Outcome::Done(trajectory))
    }
}
