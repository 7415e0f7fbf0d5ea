//! Prompts and answers that were found elsewhere.

use std::{collections::BTreeMap, time::Instant};

use serde_json::{Value, json};

use super::prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch};
use crate::{
    Case, Completion, Completions, Error, Example, Message, Result, Sampling, Subject, TestCases, digest::bytes_digest,
    eval::measuring::answers::answers_to,
};

/// The ids of a file that are those of no case.
fn without_case<'a, T>(entries: &'a BTreeMap<String, T>, cases: &[Case]) -> Vec<&'a str> {
    entries.keys().map(String::as_str).filter(|id| cases.iter().all(|case| case.id != *id)).collect()
}

/// Prompts that were found elsewhere, or on another model.
#[derive(Clone, Debug)]
pub struct Replay {
    name: String,
    test_cases: TestCases,
    samples: usize,
    sampling: Sampling,
}

impl Replay {
    /// All prompts of each case are asked.
    pub fn new(name: impl Into<String>, test_cases: TestCases) -> Self {
        Self { name: name.into(), test_cases, samples: 1, sampling: Sampling::default() }
    }

    /// Each prompt gets so many answers: the first as the subject answers, each further one drawn, at a temperature
    /// above 0. The seed decides the draws, with the case's id.
    ///
    /// # Errors
    /// If there is to be no answer, or the temperature is out of range.
    pub fn with_samples(self, samples: usize, temperature: f64, seed: u64) -> Result<Self> {
        Error::check_count("replay.samples", samples)?;
        Error::check_positive("replay.temperature", temperature)?;
        Ok(Self { samples, sampling: Sampling { temperature, seed, ..Sampling::default() }, ..self })
    }

    /// The ids that are those of no case: their prompts are not asked.
    pub fn without_case(&self, cases: &[Case]) -> Vec<&str> {
        without_case(&self.test_cases, cases)
    }

    /// The drawn answers to one of a case's prompts.
    fn drawn(&self, subject: &Subject, id: &str, messages: &[Message]) -> Result<Vec<String>> {
        let mut generation = subject.generation().clone();
        generation.sampling = Some(self.sampling.clone());
        let prompt = subject.format().prompt(messages)?;
        let example = |sample| Example::new(format!("{id}/{sample}"), prompt.clone(), Vec::new());
        let examples = (1..self.samples).map(example).collect::<Result<Vec<_>>>()?;
        let mut answers = Vec::new();
        for examples in examples.chunks(subject.rows()) {
            answers.extend(answers_to(subject.model(), subject.format(), examples.to_vec(), &generation)?);
        }
        Ok(answers)
    }
}

impl PromptAttack for Replay {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        let digest = bytes_digest(json!(self.test_cases).to_string().as_bytes());
        json!({ "test_cases": digest, "samples": self.samples, "drawn": self.sampling })
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        let begin = Instant::now();
        let prompts = self.test_cases.get(&case.id).filter(|prompts| !prompts.is_empty());
        let prompts = prompts.ok_or_else(|| Error::example(&case.id, "the test cases hold no prompt for it"))?;
        // A system prompt of the case stays; its own request gives way.
        let earlier = &case.messages[..case.messages.len().saturating_sub(1)];
        let asked = |prompt: &String| earlier.iter().cloned().chain([Message::user(prompt)]).collect::<Vec<_>>();
        let conversations: Vec<_> = prompts.iter().map(asked).collect();
        for (at, messages) in conversations.iter().enumerate() {
            let doing = || format!("asking prompt {} of {}", at + 1, conversations.len());
            subject.check(messages).map_err(|error| error.while_doing(doing()))?;
        }
        let mut attempts = Vec::new();
        for (chunk, conversations) in conversations.chunks(subject.rows()).enumerate() {
            if watch(chunk * subject.rows(), prompts.len()).is_break() {
                return Ok(Outcome::Stopped);
            }
            for (at, (messages, answer)) in conversations.iter().zip(subject.answers(conversations)?).enumerate() {
                let id = format!("{}/{}", case.id, chunk * subject.rows() + at);
                for answer in [answer].into_iter().chain(self.drawn(subject, &id, messages)?) {
                    let stream = attempts.len();
                    attempts.push(Attempt { step: 0, stream, messages: messages.clone(), loss: None, answer });
                }
            }
        }
        let cost = Cost { answers: attempts.len(), seconds: begin.elapsed().as_secs_f64(), ..Cost::default() };
        Ok(Outcome::Done(Trajectory { attempts, offered: 0, losses: Vec::new(), cost }))
    }
}

/// Answers that were made elsewhere: no model is asked, and judges judge what is there.
#[derive(Clone, Debug)]
pub struct GivenAnswers {
    name: String,
    completions: Completions,
}

impl GivenAnswers {
    /// All completions of each case are its attempts; the first is what is offered.
    pub fn new(name: impl Into<String>, completions: Completions) -> Self {
        Self { name: name.into(), completions }
    }

    /// The ids that are those of no case: their completions are not judged.
    pub fn without_case(&self, cases: &[Case]) -> Vec<&str> {
        without_case(&self.completions, cases)
    }
}

impl PromptAttack for GivenAnswers {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "completions": bytes_digest(json!(self.completions).to_string().as_bytes()) })
    }

    fn access(&self) -> Access {
        Access::Elsewhere
    }

    fn attack(&mut self, _: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        if watch(0, 1).is_break() {
            return Ok(Outcome::Stopped);
        }
        let given = self.completions.get(&case.id).filter(|given| !given.is_empty());
        let given = given.ok_or_else(|| Error::example(&case.id, "the completions hold none for it"))?;
        let attempt = |(stream, one): (usize, &Completion)| Attempt {
            step: 0,
            stream,
            messages: vec![Message::user(&one.test_case)],
            loss: None,
            answer: one.generation.clone(),
        };
        let attempts = given.iter().enumerate().map(attempt).collect();
        Ok(Outcome::Done(Trajectory { attempts, ..Trajectory::default() }))
    }
}
