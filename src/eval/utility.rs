//! Is the model still useful?

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    answers::{answers_to, losses_of_rows},
    case::Subject,
    choices::{QuestionForm, score_choices},
    refusal::refusal_phrase,
};
use crate::{Batch, ContinuationKind, Error, Example, Message, MultipleChoice, Request, Result, TokenKind, Tokens};

/// Something that a useful model does well, item by item.
pub trait UtilityTask {
    /// The task in a report: unique among those of one evaluation.
    fn name(&self) -> String;

    /// Its settings: records made with others are not gone on from.
    fn settings(&self) -> Value;

    /// The ids of its items, each once.
    fn ids(&self) -> Vec<String>;

    /// What is found for some items, in their order.
    ///
    /// # Errors
    /// Whatever the task meets; the items are then measured one by one.
    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>>;
}

/// What a task found for one item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// The item.
    pub id: String,
    /// What is true of it: a report gives the share of items.
    pub flags: BTreeMap<String, bool>,
    /// What is measured, with a weight: a report gives the weighted mean.
    pub numbers: BTreeMap<String, (f64, f64)>,
    /// What it comes from.
    pub detail: Value,
}

/// Multiple choice by likelihood: ARC and MMLU.
#[derive(Clone, Debug)]
pub struct ChoiceTask {
    name: String,
    items: Vec<(MultipleChoice, QuestionForm)>,
    in_template: bool,
}

impl ChoiceTask {
    /// Questions, each with the form in which it is put.
    pub fn new(name: impl Into<String>, items: Vec<(MultipleChoice, QuestionForm)>, in_template: bool) -> Self {
        Self { name: name.into(), items, in_template }
    }
}

impl UtilityTask for ChoiceTask {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "in_template": self.in_template })
    }

    fn ids(&self) -> Vec<String> {
        self.items.iter().map(|(item, _)| item.id.clone()).collect()
    }

    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>> {
        let measure = |item: &usize| {
            let (item, form) = &self.items[*item];
            let scores = score_choices(subject.model(), subject.format(), item, form, self.in_template)?;
            let mut flags = BTreeMap::from([("acc".to_string(), scores.is_right())]);
            if *form == QuestionForm::FullAnswers {
                flags.insert("acc_norm".into(), scores.is_right_per_character());
            }
            Ok(ItemRecord { id: item.id.clone(), flags, numbers: BTreeMap::new(), detail: json!(scores) })
        };
        items.iter().map(measure).collect()
    }
}

/// Requests that should be answered or refused, judged by refusal phrases: XSTest, harmless requests.
#[derive(Clone, Debug)]
pub struct RequestTask {
    name: String,
    requests: Vec<Request>,
    in_template: bool,
}

impl RequestTask {
    /// In the chat template, or as bare text that the model goes on from: a model can look useful without it and refuse
    /// everything within it.
    pub fn new(name: impl Into<String>, requests: Vec<Request>, in_template: bool) -> Self {
        Self { name: name.into(), requests, in_template }
    }

    fn prompt(&self, subject: &Subject, request: &Request) -> Result<Tokens> {
        if self.in_template {
            let messages = [Message::user(&request.text)];
            subject.check(&messages)?;
            return subject.format().prompt(&messages);
        }
        let ids = subject.format().tokenizer().encode(&format!("{}\n", request.text))?;
        Ok(Tokens::of_kind(ids, TokenKind::User))
    }
}

impl UtilityTask for RequestTask {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "in_template": self.in_template })
    }

    fn ids(&self) -> Vec<String> {
        self.requests.iter().map(|request| request.id.clone()).collect()
    }

    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>> {
        let requests: Vec<&Request> = items.iter().map(|item| &self.requests[*item]).collect();
        let prompt = |request: &&Request| Example::new(&request.id, self.prompt(subject, request)?, Vec::new());
        let prompts = requests.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let answers = answers_to(subject.model(), subject.format(), prompts, subject.generation())?;
        let record = |(request, answer): (&Request, String)| {
            let refused = refusal_phrase(&answer).is_some();
            let flag = if request.harmless { ("harmless refused", refused) } else { ("harmful answered", !refused) };
            let detail = json!({ "request": request.text, "answer": answer });
            let flags = BTreeMap::from([(flag.0.to_string(), flag.1)]);
            ItemRecord { id: request.id.clone(), flags, numbers: BTreeMap::new(), detail }
        };
        Ok(requests.into_iter().zip(answers).map(record).collect())
    }
}

/// The loss of the answers of held-out chats, nats per token.
#[derive(Clone, Debug)]
pub struct ChatTask {
    name: String,
    chats: Vec<Example>,
}

impl ChatTask {
    /// Chats as [`crate::encode_chats`] makes them.
    pub fn new(name: impl Into<String>, chats: Vec<Example>) -> Self {
        Self { name: name.into(), chats }
    }
}

impl UtilityTask for ChatTask {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        json!({ "chats": Example::digest(&self.chats) })
    }

    fn ids(&self) -> Vec<String> {
        self.chats.iter().map(|chat| chat.id().to_string()).collect()
    }

    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>> {
        let chats: Vec<Example> = items.iter().map(|item| self.chats[*item].clone()).collect();
        let kind = ContinuationKind::Utility;
        let batch = Batch::of_kind(&chats, kind, subject.model().device())?;
        let losses = losses_of_rows(subject.model(), &batch, kind, None)?;
        let record = |(chat, losses): (&Example, ndarray::Array1<f64>)| {
            let mean = losses.mean().ok_or_else(|| Error::example(chat.id(), "has no target"))?;
            let numbers = BTreeMap::from([("loss".to_string(), (mean, losses.len() as f64))]);
            Ok(ItemRecord { id: chat.id().into(), flags: BTreeMap::new(), numbers, detail: Value::Null })
        };
        chats.iter().zip(losses).map(record).collect()
    }
}
