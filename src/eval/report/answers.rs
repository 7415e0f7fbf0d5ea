//! What was asked and answered, as a part of the page: of each case what the attack offers and what first did harm.

use std::fmt::Write;

use serde_json::Value;

use super::{in_order, plot::escaped};
use crate::{AttackRecord, Attempt, Evaluation, TaskRecord, Trajectory};

pub(super) fn of(evaluation: &Evaluation) -> String {
    let mut html = format!("<h3>{}</h3>", escaped(&evaluation.setup().model));
    evaluation.attacks().iter().for_each(|record| html.push_str(&of_case(evaluation, record)));
    for task in in_order(evaluation.tasks().iter().map(|record| record.task.as_str())) {
        html.push_str(&of_task(task, evaluation.tasks().iter().filter(|record| record.task == task)));
    }
    html
}

fn of_case(evaluation: &Evaluation, record: &AttackRecord) -> String {
    let (attack, case) = (escaped(&record.attack), escaped(&record.case.id));
    let mut html = format!("<details><summary>{attack}: {case}</summary>");
    match &record.result {
        Err(why) => {
            let _ = write!(html, "<p class='not_judged'>failed: {}</p>", escaped(why));
        }
        Ok(trajectory) => {
            let harmful = first_harmful(evaluation, record, trajectory);
            let mut shown = vec![trajectory.offered];
            shown.extend(harmful.filter(|at| *at != trajectory.offered));
            for at in &shown {
                let Some(attempt) = trajectory.attempts.get(*at) else { continue };
                let what = if *at == trajectory.offered { "offered in the end" } else { "the first that does harm" };
                html.push_str(&of_attempt(attempt, what));
                html.push_str(&verdicts(evaluation, record, *at));
            }
            let more = trajectory.attempts.len() - shown.len();
            if more > 0 {
                let _ = write!(html, "<p>{more} more attempts are in records.jsonl</p>");
            }
        }
    }
    html + "</details>"
}

/// The first attempt that any judge holds to be harmful.
fn first_harmful(evaluation: &Evaluation, record: &AttackRecord, trajectory: &Trajectory) -> Option<usize> {
    let judges = evaluation.judges();
    let verdicts = judges.iter().filter_map(|judge| evaluation.verdicts(&record.attack, &record.case.id, judge));
    let verdicts: Vec<_> = verdicts.collect();
    (0..trajectory.attempts.len())
        .find(|at| verdicts.iter().any(|all| all.get(*at).is_some_and(|verdict| verdict.is_harmful())))
}

fn of_attempt(attempt: &Attempt, what: &str) -> String {
    let loss = attempt.loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
    let mut html = format!("<p>{what}: step {}, stream {}{loss}</p>", attempt.step, attempt.stream);
    attempt.messages.iter().for_each(|message| html.push_str(&said(&message.role, &message.content)));
    html + &said("answer", &attempt.answer)
}

fn said(role: &str, text: &str) -> String {
    format!("<pre><b>{}</b>\n{}</pre>", escaped(role), escaped(text))
}

fn verdicts(evaluation: &Evaluation, record: &AttackRecord, at: usize) -> String {
    let mut html = String::new();
    for judge in evaluation.judges() {
        let verdicts = evaluation.verdicts(&record.attack, &record.case.id, judge).unwrap_or_default();
        let Some(verdict) = verdicts.get(at) else { continue };
        let harm = serde_json::to_value(verdict.harm).unwrap_or_default();
        let class = harm.as_str().unwrap_or_default().to_string();
        let (judge, text, word) = (escaped(judge), escaped(&verdict.text), class.replace('_', " "));
        let _ = write!(html, "<p class='{class}'>{judge}: {word} ({text})</p>");
    }
    html
}

/// The requests of a task and the answers to them, if it keeps any.
fn of_task<'a>(task: &str, records: impl Iterator<Item = &'a TaskRecord>) -> String {
    let mut html = String::new();
    for item in records.filter_map(|record| record.result.as_ref().ok()) {
        let text = |field: &str| item.detail.get(field).and_then(Value::as_str);
        let (Some(request), Some(answer)) = (text("request"), text("answer")) else { continue };
        let flags: Vec<&str> = item.flags.iter().filter(|(_, is_so)| **is_so).map(|(flag, _)| flag.as_str()).collect();
        let flags = if flags.is_empty() { String::new() } else { format!(": {}", flags.join(", ")) };
        let _ = write!(html, "<p>{}{}</p>", escaped(&item.id), escaped(&flags));
        html.push_str(&said("request", request));
        html.push_str(&said("answer", answer));
    }
    if html.is_empty() {
        return html;
    }
    format!("<details><summary>{}</summary>{html}</details>", escaped(task))
}
