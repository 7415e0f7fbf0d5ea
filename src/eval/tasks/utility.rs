//! Is the model still useful?

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    choices::{QuestionForm, choice_examples, score_examples},
    framing::Framing,
};
use crate::{
    Batch, ContinuationKind, Error, Example, MultipleChoice, Request, Result, Subject, TokenKind, Tokens,
    digest::bytes_digest,
    eval::measuring::answers::{answers_to, losses_of_rows},
    is_refusal,
};

/// Something that a useful model does well, item by item.
pub trait UtilityTask {
    /// The task in a report: unique among those of one evaluation.
    fn name(&self) -> String;

    /// Its settings, with what tells its items from others: records made with others are not gone on from.
    fn settings(&self) -> Value;

    /// The ids of its items, each once.
    fn ids(&self) -> Vec<String>;

    /// What is found for some items, in their order.
    ///
    /// # Errors
    /// Whatever the task meets; an evaluation then measures their halves, all items anew.
    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>>;
}

/// What a task found for one item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// The item.
    pub id: String,
    /// What is true of it: a report gives the share of items.
    pub flags: BTreeMap<String, bool>,
    /// What is measured, with a weight: a report gives the weighted mean. Beside that of a number called `loss`, in
    /// nats per token and weighted by tokens, it gives its exponential, the perplexity.
    pub numbers: BTreeMap<String, (f64, f64)>,
    /// What it comes from.
    pub detail: Value,
}

/// A short text that differs between lists of items.
fn items_digest(items: &impl Serialize) -> String {
    bytes_digest(json!(items).to_string().as_bytes())
}

/// Multiple choice by likelihood: ARC and MMLU.
#[derive(Clone, Debug)]
pub struct ChoiceTask {
    name: String,
    items: Vec<(MultipleChoice, QuestionForm)>,
    framing: Framing,
    settings: Value,
}

impl ChoiceTask {
    /// Questions, each with the form in which it is put.
    pub fn new(name: impl Into<String>, items: Vec<(MultipleChoice, QuestionForm)>, framing: Framing) -> Self {
        let lettered = items.iter().filter_map(|(_, form)| match form {
            QuestionForm::Letters { subject, examples } => Some((subject, examples.len())),
            QuestionForm::FullAnswers => None,
        });
        let (subjects, shots): (BTreeSet<&String>, BTreeSet<usize>) = lettered.unzip();
        let mut settings = json!({ "framing": framing, "items": items.len(), "digest": items_digest(&items) });
        if !subjects.is_empty() {
            settings["subjects"] = json!(subjects.len());
            settings["shots"] = json!(shots);
        }
        Self { name: name.into(), items, framing, settings }
    }
}

impl UtilityTask for ChoiceTask {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        self.settings.clone()
    }

    fn ids(&self) -> Vec<String> {
        self.items.iter().map(|(item, _)| item.id.clone()).collect()
    }

    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>> {
        let measure = |item: &usize| {
            let (item, form) = &self.items[*item];
            let examples = choice_examples(subject.format(), item, form, self.framing)?;
            examples.iter().try_for_each(|example| subject.check_length(example.len()))?;
            let scores = score_examples(subject.model(), item, form, &examples)?;
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
///
/// An answer without text neither refuses nor helps: it is counted by a flag of its own.
#[derive(Clone, Debug)]
pub struct RequestTask {
    name: String,
    requests: Vec<Request>,
    framing: Framing,
    settings: Value,
}

impl RequestTask {
    /// In the chat template, or as bare text that the model goes on from.
    pub fn new(name: impl Into<String>, requests: Vec<Request>, framing: Framing) -> Self {
        let settings = json!({ "framing": framing, "items": requests.len(), "digest": items_digest(&requests) });
        Self { name: name.into(), requests, framing, settings }
    }

    fn prompt(&self, subject: &Subject, request: &Request) -> Result<Tokens> {
        match self.framing {
            Framing::Template => {
                let messages = [request.message()];
                subject.check(&messages)?;
                subject.format().prompt(&messages)
            }
            Framing::Text { bos } => {
                let ids = Framing::plain(subject.format(), &format!("{}\n", request.text), bos)?;
                subject.check_length(ids.len() + subject.generation().max_new_tokens)?;
                Ok(Tokens::of_kind(ids, TokenKind::User))
            }
        }
    }
}

impl UtilityTask for RequestTask {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn settings(&self) -> Value {
        self.settings.clone()
    }

    fn ids(&self) -> Vec<String> {
        self.requests.iter().map(|request| request.id.clone()).collect()
    }

    fn measure(&mut self, subject: &Subject, items: &[usize]) -> Result<Vec<ItemRecord>> {
        let requests: Vec<&Request> = items.iter().map(|item| &self.requests[*item]).collect();
        let prompt = |request: &&Request| Example::new(&request.id, self.prompt(subject, request)?, Vec::new());
        let prompts = requests.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let answers = answers_to(subject.model(), subject.format(), prompts, subject.generation())?;
        Ok(requests.into_iter().zip(answers).map(|(request, answer)| answered(request, &answer)).collect())
    }
}

/// What an answer to a request counts as.
fn answered(request: &Request, answer: &str) -> ItemRecord {
    let (empty, refused) = (answer.trim().is_empty(), is_refusal(answer));
    let (name, is_so) =
        if request.harmless { ("harmless refused", refused) } else { ("harmful answered", !refused && !empty) };
    ItemRecord {
        id: request.id.clone(),
        flags: BTreeMap::from([(name.to_string(), is_so), ("no answer".to_string(), empty)]),
        numbers: BTreeMap::new(),
        detail: json!({ "request": request.text, "answer": answer }),
    }
}

/// The loss of the answers of held-out chats in nats per token: `loss` is the mean over tokens, `loss of a chat` the mean over chats
/// of the mean of each, in which long answers count no more than short ones.
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
        chats.iter().try_for_each(|chat| subject.check_length(chat.len()))?;
        let kind = ContinuationKind::Utility;
        let batch = Batch::of_kind(&chats, kind, subject.model().device())?;
        let losses = losses_of_rows(subject.model(), &batch, kind, None)?;
        let record = |(chat, losses): (&Example, ndarray::Array1<f64>)| {
            let mean = losses.mean().ok_or_else(|| Error::example(chat.id(), "has no target"))?;
            let numbers = [("loss", (mean, losses.len() as f64)), ("loss of a chat", (mean, 1.0))];
            let numbers = numbers.map(|(name, number)| (name.to_string(), number)).into();
            Ok(ItemRecord { id: chat.id().into(), flags: BTreeMap::new(), numbers, detail: Value::Null })
        };
        chats.iter().zip(losses).map(record).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_answer_is_neither_a_refusal_nor_an_answer() {
        let flags = |harmless, answer: &str| -> Vec<(String, bool)> {
            let request = Request { id: "r".into(), text: "Sing".into(), harmless };
            answered(&request, answer).flags.into_iter().collect()
        };
        let said = |name: &str, is_so, empty| vec![(name.to_string(), is_so), ("no answer".to_string(), empty)];
        assert_eq!(flags(true, " \n"), said("harmless refused", false, true));
        assert_eq!(flags(true, "I cannot."), said("harmless refused", true, false));
        assert_eq!(flags(false, ""), said("harmful answered", false, true));
        assert_eq!(flags(false, "La la"), said("harmful answered", true, false));
    }
}
