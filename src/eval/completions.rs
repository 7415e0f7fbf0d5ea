//! HarmBench's own files of test cases and completions, in and out.

use std::{collections::BTreeMap, path::Path, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    case::{Case, Subject},
    evaluation::Evaluation,
    prompt_attack::{Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
};
use crate::{Error, Message, Result, digest::bytes_digest, files};

/// Prompts for each behaviour, by its id.
pub type TestCases = BTreeMap<String, Vec<String>>;

/// A prompt and what a model said to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The prompt.
    pub test_case: String,
    /// What the model said.
    pub generation: String,
}

/// Reads test cases: an object from behaviour ids to lists of prompts.
///
/// # Errors
/// If the file cannot be read or has another form.
pub fn load_test_cases(path: impl AsRef<Path>) -> Result<TestCases> {
    files::read_json(path.as_ref())
}

/// Writes what an attack offers for each case as test cases, and what the model said to it as completions: for other models,
/// and for a judge on another machine.
///
/// # Errors
/// If there is no record of the attack, or a file cannot be written.
pub fn save_completions(
    evaluation: &Evaluation,
    attack: &str,
    test_cases: impl AsRef<Path>,
    completions: impl AsRef<Path>,
) -> Result<()> {
    let records: Vec<_> = evaluation.attacks().iter().filter(|record| record.attack == attack).collect();
    if records.is_empty() {
        return Err(Error::mismatch("attack whose completions are to be saved", "one that was made", attack));
    }
    let mut prompts = TestCases::new();
    let mut said: BTreeMap<String, Vec<Completion>> = BTreeMap::new();
    for record in records {
        let Some(attempt) = record.result.as_ref().ok().and_then(Trajectory::offer) else { continue };
        let Some(last) = attempt.messages.last() else { continue };
        let (test_case, generation) = (last.content.clone(), attempt.answer.clone());
        prompts.entry(record.case.id.clone()).or_default().push(test_case.clone());
        said.entry(record.case.id.clone()).or_default().push(Completion { test_case, generation });
    }
    files::write_json(test_cases.as_ref(), &prompts)?;
    files::write_json(completions.as_ref(), &said)
}

/// Prompts that were found elsewhere, or on another model.
#[derive(Clone, Debug)]
pub struct Replay {
    name: String,
    test_cases: TestCases,
}

impl Replay {
    /// All prompts of each case are asked.
    pub fn new(name: impl Into<String>, test_cases: TestCases) -> Self {
        Self { name: name.into(), test_cases }
    }
}

impl PromptAttack for Replay {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "test_cases": bytes_digest(json!(self.test_cases).to_string().as_bytes()) })
    }

    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome> {
        let begin = Instant::now();
        if watch(0, 1).is_break() {
            return Ok(Outcome::Stopped);
        }
        let prompts = self.test_cases.get(&case.id).filter(|prompts| !prompts.is_empty());
        let prompts = prompts.ok_or_else(|| Error::example(&case.id, "the test cases hold no prompt for it"))?;
        // A system prompt of the case stays; its own request gives way.
        let earlier = &case.messages[..case.messages.len().saturating_sub(1)];
        let asked = |prompt: &String| earlier.iter().cloned().chain([Message::user(prompt)]).collect::<Vec<_>>();
        let conversations: Vec<_> = prompts.iter().map(asked).collect();
        let answers = subject.answers(&conversations)?;
        let attempts = conversations.into_iter().zip(answers).enumerate();
        let attempts: Vec<Attempt> = attempts
            .map(|(stream, (messages, answer))| Attempt { step: 0, stream, messages, loss: None, answer })
            .collect();
        let cost = Cost { answers: attempts.len(), seconds: begin.elapsed().as_secs_f64(), ..Cost::default() };
        Ok(Outcome::Done(Trajectory { attempts, offered: 0, losses: Vec::new(), cost }))
    }
}
