//! HarmBench's own files of test cases and completions, in and out.

use std::{collections::BTreeMap, fmt, marker::PhantomData, path::Path, time::Instant};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, json};

use super::{
    answers::answers_to,
    case::{Case, Subject},
    evaluation::Evaluation,
    prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch},
    records::AttackRecord,
};
use crate::{Error, Example, Message, Result, Sampling, digest::bytes_digest, files, load_targets};

/// Prompts for each behaviour, by its id.
pub type TestCases = BTreeMap<String, Vec<String>>;

/// Prompts with their answers for each behaviour, by its id.
pub type Completions = BTreeMap<String, Vec<Completion>>;

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
/// If the file cannot be read, has another form or an id twice, or holds no id.
pub fn load_test_cases(path: impl AsRef<Path>) -> Result<TestCases> {
    let path = path.as_ref();
    not_empty(path, load_targets(path)?.into_iter().collect())
}

/// Reads completions: an object from behaviour ids to lists of `{"test_case": text, "generation": text}`. Other fields,
/// such as HarmBench's labels, are ignored.
///
/// # Errors
/// If the file cannot be read, has another form or an id twice, or holds no id.
pub fn load_completions(path: impl AsRef<Path>) -> Result<Completions> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let mut deserializer = serde_json::Deserializer::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text));
    let read = OnceEach::<Vec<Completion>>::deserialize(&mut deserializer).and_then(|map| {
        deserializer.end()?;
        Ok(map.0)
    });
    let wrong = |error| {
        let form = r#"an object from behaviour ids to lists of {"test_case": text, "generation": text}, each id once"#;
        Error::file(path, format!("{error}; expected {form}"))
    };
    not_empty(path, read.map_err(wrong)?)
}

fn not_empty<T>(path: &Path, found: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    if found.is_empty() {
        return Err(Error::file(path, "holds no behaviour id; at least one is needed"));
    }
    Ok(found)
}

/// A JSON object that refuses a repeated key.
struct OnceEach<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OnceEach<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = OnceEach<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from behaviour ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OnceEach<T>, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((id, value)) = map.next_entry::<String, T>()? {
                    if entries.contains_key(&id) {
                        return Err(serde::de::Error::custom(format!("the id {id} occurs twice")));
                    }
                    entries.insert(id, value);
                }
                Ok(OnceEach(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// Writes what an attack offers for each case as test cases, and what the model said to it as completions: for other
/// models, and for a judge on another machine. Returns the ids of the cases that are left out, and why.
///
/// # Errors
/// If there is no record of the attack, its success is not in the text alone ([`Access`]), or a file cannot be written.
pub fn save_completions(
    evaluation: &Evaluation,
    attack: &str,
    test_cases: impl AsRef<Path>,
    completions: impl AsRef<Path>,
) -> Result<BTreeMap<String, String>> {
    let records: Vec<&AttackRecord> = evaluation.attacks().iter().filter(|record| record.attack == attack).collect();
    let Some(first) = records.first() else {
        return Err(Error::mismatch("attack whose completions are to be saved", "one that was made", attack));
    };
    if first.access != Access::Text {
        let what = format!("access that the attack {attack} needs, whose completions are to be saved");
        return Err(Error::mismatch(what, "text: its prompts alone do not do what it did", json!(first.access)));
    }
    let (mut prompts, mut said, mut left_out) = (TestCases::new(), Completions::new(), BTreeMap::new());
    for record in records {
        let id = record.case.id.clone();
        match offered(record) {
            Ok(completion) => {
                prompts.insert(id.clone(), vec![completion.test_case.clone()]);
                said.insert(id, vec![completion]);
            }
            Err(why) => drop(left_out.insert(id, why)),
        }
    }
    files::write_json(test_cases.as_ref(), &prompts)?;
    files::write_json(completions.as_ref(), &said)?;
    Ok(left_out)
}

/// What an attack offers for a case, or why there is nothing.
fn offered(record: &AttackRecord) -> std::result::Result<Completion, String> {
    let attempt = record.result.as_ref().map_err(|why| format!("the attack failed: {why}"))?;
    let attempt = attempt.offer().ok_or("the attack offers nothing")?;
    let last = attempt.messages.last().ok_or("the attack asked nothing")?;
    Ok(Completion { test_case: last.content.clone(), generation: attempt.answer.clone() })
}

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
        if samples == 0 {
            return Err(Error::setting("replay.samples", 0, "at least 1"));
        }
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::setting("replay.temperature", temperature, "above 0"));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T>(text: &str, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn files_of_harmbench_are_read_and_broken_ones_are_named() {
        let found = read("\u{feff}{\"a\": [\"x\", \"y\"]}", |path| load_test_cases(path)).unwrap();
        assert_eq!(found["a"], ["x", "y"]);
        let labelled = r#"{"a": [{"test_case": "x", "generation": "y", "label": 1}]}"#;
        let found = read(labelled, |path| load_completions(path)).unwrap();
        assert_eq!(found["a"], [Completion { test_case: "x".into(), generation: "y".into() }]);
        let wrong = |text: &str| {
            let messages = [
                read(text, |path| load_test_cases(path)).unwrap_err().to_string(),
                read(text, |path| load_completions(path)).unwrap_err().to_string(),
            ];
            messages.join("\n")
        };
        assert_eq!(wrong("{}").matches("x.json: holds no behaviour id; at least one is needed").count(), 2);
        assert_eq!(wrong(r#"{"a": [], "a": []}"#).matches("the id a occurs twice").count(), 2);
        assert_eq!(wrong(r#"{"a": []} x"#).matches("trailing characters").count(), 2);
        assert_eq!(wrong("[1]").matches("expected an object from behaviour ids to lists").count(), 2);
    }
}
