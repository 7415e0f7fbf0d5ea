//! Whether models were evaluated alike, so that their figures can be compared.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Intended, attacks, tasks};
use crate::{Case, Evaluation, Plan};

/// What an evaluation did, or is to do.
struct Done<'a> {
    evaluation: &'a Evaluation,
    attacks: Vec<Intended<'a>>,
    tasks: Vec<Intended<'a>>,
    cases: BTreeMap<&'a str, &'a Case>,
    judges: BTreeMap<&'a str, &'a Value>,
}

impl<'a> Done<'a> {
    fn of(evaluation: &'a Evaluation) -> Self {
        Self {
            evaluation,
            attacks: attacks(evaluation),
            tasks: tasks(evaluation),
            cases: cases(evaluation),
            judges: judges(evaluation),
        }
    }

    fn model(&self) -> &'a str {
        &self.evaluation.setup().model
    }
}

/// In what each evaluation differs, in words: in its setup and in what it has from the first of all, in each thing that it has
/// from the first that has the same.
pub(super) fn differences(evaluations: &[Evaluation]) -> Vec<String> {
    let all: Vec<Done> = evaluations.iter().map(Done::of).collect();
    let Some((first, others)) = all.split_first() else { return Vec::new() };
    let of = |(at, other): (usize, &Done)| {
        let names = (first.model(), other.model());
        let mut found = of_setups(first.evaluation, other.evaluation);
        found.extend(of_one_alone("attack", "made on", names, &first.attacks, &other.attacks));
        found.extend(of_one_alone("task", "measured on", names, &first.tasks, &other.tasks));
        found.extend(from_earlier(&all[..=at], other));
        found
    };
    others.iter().enumerate().flat_map(of).collect()
}

fn from_earlier(earlier: &[Done], other: &Done) -> Vec<String> {
    let (mut found, name) = (Vec::new(), other.model());
    for one in &other.attacks {
        if let Some((was_of, same)) = first_with(earlier, |done| named(&done.attacks, one.name)) {
            found.extend(of_intended("attack", "cases", (was_of, same), (name, one)));
        }
    }
    for one in &other.tasks {
        if let Some((was_of, same)) = first_with(earlier, |done| named(&done.tasks, one.name)) {
            found.extend(of_intended("task", "items", (was_of, same), (name, one)));
        }
    }
    for (id, case) in &other.cases {
        let known = first_with(earlier, |done| done.cases.get(id));
        if let Some((was_of, _)) = known.filter(|(_, known)| *known != case) {
            found.push(format!("the case {id:?} is another in {was_of} than in {name}"));
        }
    }
    for (judge, settings) in &other.judges {
        let known = first_with(earlier, |done| done.judges.get(judge));
        if let Some((was_of, known)) = known.filter(|(_, known)| *known != settings) {
            found.push(format!("the judge {judge:?}: {known} in {was_of}, {settings} in {name}"));
        }
    }
    found
}

/// The first that has a thing: its model, and the thing.
fn first_with<'d, 'a, T>(
    earlier: &'d [Done<'a>],
    thing: impl Fn(&'d Done<'a>) -> Option<&'d T>,
) -> Option<(&'a str, &'d T)> {
    earlier.iter().find_map(|done| Some((done.model(), thing(done)?)))
}

fn named<'d, 'a>(things: &'d [Intended<'a>], name: &str) -> Option<&'d Intended<'a>> {
    things.iter().find(|one| one.name == name)
}

/// What a setup says about how a model is asked.
fn of_setups(first: &Evaluation, other: &Evaluation) -> Vec<String> {
    let fields = ["template", "rendered", "date", "dtype", "generation", "version", "libtorch"];
    let (was, is) = (json!(first.setup()), json!(other.setup()));
    let names = (&first.setup().model, &other.setup().model);
    let differing = fields.into_iter().filter(|field| was[*field] != is[*field]);
    differing.map(|field| format!("{field}: {} in {}, {} in {}", was[field], names.0, is[field], names.1)).collect()
}

/// What one of two has and the other has not: rates over all attacks are over those that a model has.
fn of_one_alone(what: &str, done: &str, names: (&str, &str), first: &[Intended], other: &[Intended]) -> Vec<String> {
    let alone = |things: &[Intended], with, others: &[Intended], without| {
        let missing = things.iter().filter(|one| named(others, one.name).is_none());
        missing
            .map(|one| format!("the {what} {:?} was {done} {with} and not on {without}", one.name))
            .collect::<Vec<_>>()
    };
    [alone(first, names.0, other, names.1), alone(other, names.1, first, names.0)].concat()
}

fn of_intended(what: &str, ids: &str, first: (&str, &Intended), other: (&str, &Intended)) -> Vec<String> {
    let ((was_of, was), (is_of, is)) = (first, other);
    let (name, mut found) = (is.name, Vec::new());
    if was.settings != is.settings {
        let (was, is) = (was.settings, is.settings);
        found.push(format!("settings of the {what} {name:?}: {was} in {was_of}, {is} in {is_of}"));
    }
    if was.ids != is.ids {
        let common = was.ids.intersection(&is.ids).count();
        let (was, is) = (was.ids.len(), is.ids.len());
        found.push(format!(
            "{ids} of the {what} {name:?}: {was} in {was_of}, {is} in {is_of}, {common} of them the same"
        ));
    }
    found
}

fn cases(evaluation: &Evaluation) -> BTreeMap<&str, &Case> {
    evaluation.attacks().iter().map(|record| (record.case.id.as_str(), &record.case)).collect()
}

fn judges(evaluation: &Evaluation) -> BTreeMap<&str, &Value> {
    let planned = evaluation.plans().iter().filter_map(|plan| match plan {
        Plan::Judge { judge, settings } => Some((judge.as_str(), settings)),
        _ => None,
    });
    let judged: BTreeSet<_> = evaluation.all_verdicts().map(|record| record.judge.as_str()).collect();
    let of_verdicts = judged.into_iter().filter_map(|judge| {
        let record = evaluation.all_verdicts().find(|record| record.judge == judge)?;
        Some((judge, &record.settings))
    });
    planned.chain(of_verdicts).collect()
}
