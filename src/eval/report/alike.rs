//! Whether models were evaluated alike, so that their figures can be compared.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Intended, attacks, tasks};
use crate::{Case, Evaluation, Plan};

/// In what each evaluation differs from the first that has the same thing, in words.
pub(super) fn differences(evaluations: &[Evaluation]) -> Vec<String> {
    let Some((first, others)) = evaluations.split_first() else { return Vec::new() };
    others.iter().flat_map(|other| of_two(first, other)).collect()
}

fn of_two(first: &Evaluation, other: &Evaluation) -> Vec<String> {
    let names = (first.setup().model.as_str(), other.setup().model.as_str());
    let mut found = of_setups(first, other);
    let (attacked, other_attacked) = (attacks(first), attacks(other));
    found.extend(attacks_of_one(names, &attacked, &other_attacked));
    found.extend(of_intended("attack", "cases", names, &attacked, &other_attacked));
    found.extend(of_intended("task", "items", names, &tasks(first), &tasks(other)));
    let (cases, others) = (cases(first), cases(other));
    for (id, case) in &cases {
        if others.get(id).is_some_and(|other| other != case) {
            found.push(format!("the case {id:?} is another in {} than in {}", names.0, names.1));
        }
    }
    let (judges, others) = (judges(first), judges(other));
    for (judge, settings) in &judges {
        if let Some(other) = others.get(judge).filter(|other| *other != settings) {
            found.push(format!("the judge {judge:?}: {settings} in {}, {other} in {}", names.0, names.1));
        }
    }
    found
}

/// What a setup says about how a model is asked.
fn of_setups(first: &Evaluation, other: &Evaluation) -> Vec<String> {
    let fields = ["template", "rendered", "date", "dtype", "generation", "version", "libtorch"];
    let (was, is) = (json!(first.setup()), json!(other.setup()));
    let names = (&first.setup().model, &other.setup().model);
    let differing = fields.into_iter().filter(|field| was[*field] != is[*field]);
    differing.map(|field| format!("{field}: {} in {}, {} in {}", was[field], names.0, is[field], names.1)).collect()
}

/// Rates over all attacks are over those that a model has.
fn attacks_of_one(names: (&str, &str), first: &[Intended], other: &[Intended]) -> Vec<String> {
    let alone = |of: &[Intended], name, others: &[Intended], without| {
        let missing = of.iter().filter(|one| others.iter().all(|same| same.name != one.name));
        missing
            .map(|one| format!("the attack {:?} was made on {name} and not on {without}", one.name))
            .collect::<Vec<_>>()
    };
    [alone(first, names.0, other, names.1), alone(other, names.1, first, names.0)].concat()
}

fn of_intended(what: &str, ids: &str, names: (&str, &str), first: &[Intended], other: &[Intended]) -> Vec<String> {
    let mut found = Vec::new();
    for one in first {
        let Some(same) = other.iter().find(|same| same.name == one.name) else { continue };
        let name = one.name;
        if one.settings != same.settings {
            let (first, other) = (one.settings, same.settings);
            found.push(format!("settings of the {what} {name:?}: {first} in {}, {other} in {}", names.0, names.1));
        }
        if one.ids != same.ids {
            let common = one.ids.intersection(&same.ids).count();
            let (first, other) = (one.ids.len(), same.ids.len());
            found.push(format!(
                "{ids} of the {what} {name:?}: {first} in {}, {other} in {}, {common} of them the same",
                names.0, names.1
            ));
        }
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
