//! The request as it is, and with the beginning of its answer given.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch, attack_alone},
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
        Error::check_count("direct.samples", self.samples)?;
        Error::check_positive("direct.temperature", self.temperature)
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

    /// How the answers of one stream are made, each of which has at least so many tokens already.
    fn generation(&self, subject: &Subject, stream: usize, given: usize) -> Generation {
        let mut generation = subject.generation().clone();
        generation.max_new_tokens = left(subject, given);
        if stream > 0 {
            let drawn = generation.sampling.unwrap_or_default();
            let (temperature, seed) = (self.settings.temperature, self.settings.seed);
            generation.sampling = Some(Sampling { temperature, seed, ..drawn });
        }
        generation
    }

    /// What the model reads of a case.
    fn asked(&self, subject: &Subject, case: &Case) -> Result<Asked> {
        can_be_asked(subject, case)?;
        if self.settings.prefill > 0 {
            has_a_target(case)?;
        }
        let (format, given) = (subject.format(), self.given(case));
        if given.is_empty() {
            return Ok(Asked { prompt: format.prompt(&case.messages)?, given: 0 });
        }
        let opening = format.opening(&case.messages, given)?;
        let mut prompt = opening.prompt;
        prompt.extend_as_template(&opening.continuation);
        Ok(Asked { prompt, given: opening.continuation.len() })
    }
}

/// How many tokens may follow those that were given.
fn left(subject: &Subject, given: usize) -> usize {
    subject.generation().max_new_tokens.saturating_sub(given).max(1)
}

/// A prompt, and how many of its last tokens are the answer's.
struct Asked {
    prompt: Tokens,
    given: usize,
}

impl Asked {
    /// The whole answer: decoded as one text, since some decoders drop the space before the first word of what they are
    /// given. The words given are among its tokens, so that as many of those said are too many. Where nothing was said behind
    /// them there is no answer: what was given are the attacker's own words.
    fn answer(&self, subject: &Subject, mut said: Vec<i64>) -> Result<String> {
        said.truncate(left(subject, self.given));
        if self.given > 0 && subject.format().tokenizer().decode(&said, true)?.trim().is_empty() {
            return Ok(String::new());
        }
        let mut ids = self.prompt.ids()[self.prompt.len() - self.given..].to_vec();
        ids.append(&mut said);
        let text = subject.format().tokenizer().decode(&ids, true)?;
        // The template's own space, where it is a token with the first word.
        Ok(if self.given > 0 { text.trim_start().to_string() } else { text })
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
        attack_alone(self, subject, case, watch)
    }

    fn at_once(&self, subject: &Subject) -> usize {
        subject.rows()
    }

    fn attack_together(&mut self, subject: &Subject, cases: &[Case], watch: &mut Watch) -> Result<Vec<Outcome>> {
        let begin = Instant::now();
        let (model, samples) = (subject.model(), self.settings.samples);
        let asked = cases.iter().map(|case| self.asked(subject, case)).collect::<Result<Vec<_>>>()?;
        let given = asked.iter().map(|one| one.given).min().unwrap_or(0);
        let mut attempts = vec![Vec::with_capacity(samples); cases.len()];
        for stream in 0..samples {
            if watch(stream, samples).is_break() {
                return Ok(vec![Outcome::Stopped; cases.len()]);
            }
            let rows = cases.iter().zip(&asked);
            let examples =
                rows.map(|(case, one)| Example::new(format!("{}/{stream}", case.id), one.prompt.clone(), Vec::new()));
            let batch = Batch::new(examples.collect::<Result<_>>()?, model.device())?;
            let said = model.generate(&batch, None, &self.generation(subject, stream, given))?;
            for (((case, one), said), attempts) in cases.iter().zip(&asked).zip(said).zip(&mut attempts) {
                let (messages, answer) = (case.messages.clone(), one.answer(subject, said)?);
                attempts.push(Attempt { step: 0, stream, messages, loss: None, answer });
            }
        }
        let seconds = begin.elapsed().as_secs_f64() / cases.len() as f64;
        let cost = Cost { answers: samples, seconds, ..Cost::default() };
        let outcome = |attempts| Outcome::Done(Trajectory { attempts, cost, ..Trajectory::default() });
        Ok(attempts.into_iter().map(outcome).collect())
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
