//! The request as it is, and with the beginning of its answer given.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
    requirements::{can_be_asked, has_a_target},
};
use crate::{Batch, Case, Error, Example, Generation, Result, Sampling, Subject, Tokens};

/// How a plain request is asked.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `samples` | 1 | answers: the first as the subject answers, each further one drawn | at least 1 |
/// | `temperature` | 1 | of the drawn answers | above 0 |
/// | `prefill` | 0 | so many words of the target, but never its last one, are put into the model's mouth | |
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

    /// The first words of the target as it writes them; at least one word is left to the model.
    fn given<'c>(&self, case: &'c Case) -> &'c str {
        let target = case.target.trim();
        let pairs = target.char_indices().zip(target.chars().skip(1));
        let ends = pairs.filter(|((_, this), next)| !this.is_whitespace() && next.is_whitespace());
        let end = ends.take(self.settings.prefill).last().map_or(0, |((at, this), _)| at + this.len_utf8());
        &target[..end]
    }

    /// How the answer of one stream is made; the words given are among its tokens.
    fn generation(&self, subject: &Subject, stream: usize, given: usize) -> Generation {
        let mut generation = subject.generation().clone();
        generation.max_new_tokens = generation.max_new_tokens.saturating_sub(given).max(1);
        if stream > 0 {
            let drawn = generation.sampling.unwrap_or_default();
            let (temperature, seed) = (self.settings.temperature, self.settings.seed);
            generation.sampling = Some(Sampling { temperature, seed, ..drawn });
        }
        generation
    }
}

/// What the model reads, and how many of its last tokens are the answer's.
fn prompt(subject: &Subject, case: &Case, given: &str) -> Result<(Tokens, usize)> {
    let format = subject.format();
    if given.is_empty() {
        return Ok((format.prompt(&case.messages)?, 0));
    }
    let opening = format.opening(&case.messages, given)?;
    let mut prompt = opening.prompt;
    prompt.extend_as_template(&opening.continuation);
    Ok((prompt, opening.continuation.len()))
}

/// The answer that begins with the last `given` tokens of a prompt: decoded as one text, since some decoders drop the
/// space before the first word of what they are given.
fn answer(subject: &Subject, prompt: Example, given: usize, generation: &Generation) -> Result<String> {
    let mut ids = prompt.prompt().ids()[prompt.prompt().len() - given..].to_vec();
    let said = subject.model().generate(&Batch::new(vec![prompt], subject.model().device())?, None, generation)?;
    ids.extend(said.into_iter().flatten());
    let text = subject.format().tokenizer().decode(&ids, true)?;
    // The template's own space, where it is a token with the first word.
    Ok(if given > 0 { text.trim_start().to_string() } else { text })
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
        can_be_asked(subject, case)?;
        if self.settings.prefill > 0 {
            has_a_target(case)?;
        }
        let (prompt, given) = prompt(subject, case, self.given(case))?;
        let mut trajectory = Trajectory::default();
        for stream in 0..self.settings.samples {
            if watch(stream, self.settings.samples).is_break() {
                return Ok(Outcome::Stopped);
            }
            let example = Example::new(format!("{}/{stream}", case.id), prompt.clone(), Vec::new())?;
            let answer = answer(subject, example, given, &self.generation(subject, stream, given))?;
            let messages = case.messages.clone();
            trajectory.attempts.push(Attempt { step: 0, stream, messages, loss: None, answer });
        }
        let seconds = begin.elapsed().as_secs_f64();
        trajectory.cost = Cost { answers: trajectory.attempts.len(), seconds, ..Cost::default() };
        Ok(Outcome::Done(trajectory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_words_are_the_targets_own_text_and_never_all_of_it() {
        let given = |target: &str, prefill| {
            let case = Case {
                id: "x".into(),
                behavior: String::new(),
                context: None,
                target: target.into(),
                messages: Vec::new(),
            };
            Direct::new(DirectSettings { prefill, ..Default::default() }).unwrap().given(&case).to_string()
        };
        assert_eq!(given(" Title:\n\nStep 1 of é 3", 2), "Title:\n\nStep");
        assert_eq!(given("a  b c", 9), "a  b");
        assert_eq!(given("é b", 1), "é");
        assert_eq!(given("Sure", 3), "");
        assert_eq!(given("a b", 0), "");
    }
}
