//! What attacks offer, in HarmBench's files.

use std::{collections::BTreeMap, path::Path};

use serde_json::json;

use super::{evaluation::Evaluation, records::AttackRecord};
use crate::{Access, Completion, Completions, Error, Result, TestCases, files};

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
