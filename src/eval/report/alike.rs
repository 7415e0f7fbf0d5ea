//! Whether models were evaluated alike, so that their figures can be compared.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Intended, attacks, tasks};
use crate::{Case, Evaluation, Plan};

/// In what each evaluation differs, in words: in its setup and in what it has from the first of all, in each thing that it has
/// from the first that has the same.
pub(super) fn differences(evaluations: &[Evaluation]) -> Vec<String> {
    let Some((first, others)) = evaluations.split_first() else { return Vec::new() };
    let of = |(at, other)| {
        let mut found = of_setups(first, other);
        found.extend(of_one_alone("attack", "made on", (first, &attacks(first)), (other, &attacks(other))));
        found.extend(of_one_alone("task", "measured on", (first, &tasks(first)), (other, &tasks(other))));
        found.extend(from_earlier(&evaluations[..=at], other));
        found
    };
    others.iter().enumerate().flat_map(of).collect()
}

fn model(evaluation: &Evaluation) -> &str {
    &evaluation.setup().model
}

fn from_earlier(earlier: &[Evaluation], other: &Evaluation) -> Vec<String> {
    let mut found = Vec::new();
    for (what, ids, things) in [("attack", "cases", attacks as Things), ("task", "items", tasks)] {
        for one in things(other) {
            let same = earlier.iter().find_map(|earlier| {
                let same = things(earlier).into_iter().find(|same| same.name == one.name)?;
                Some((model(earlier), same))
            });
            if let Some((was_of, same)) = same {
                found.extend(of_intended(what, ids, (was_of, &same), (model(other), &one)));
            }
        }
    }
    for (id, case) in cases(other) {
        let known = earlier.iter().find_map(|earlier| Some((model(earlier), *cases(earlier).get(id)?)));
        if let Some((was_of, _)) = known.filter(|(_, known)| *known != case) {
            found.push(format!("the case {id:?} is another in {was_of} than in {}", model(other)));
        }
    }
    for (judge, settings) in judges(other) {
        let known = earlier.iter().find_map(|earlier| Some((model(earlier), *judges(earlier).get(judge)?)));
        if let Some((was_of, known)) = known.filter(|(_, known)| *known != settings) {
            found.push(format!("the judge {judge:?}: {known} in {was_of}, {settings} in {}", model(other)));
        }
    }
    found
}

/// The attacks of an evaluation, or its tasks.
type Things = for<'a> fn(&'a Evaluation) -> Vec<Intended<'a>>;

/// What a setup says about how a model is asked.
fn of_setups(first: &Evaluation, other: &Evaluation) -> Vec<String> {
    let fields = ["template", "rendered", "date", "dtype", "generation", "version", "libtorch"];
    let (was, is) = (json!(first.setup()), json!(other.setup()));
    let names = (&first.setup().model, &other.setup().model);
    let differing = fields.into_iter().filter(|field| was[*field] != is[*field]);
    differing.map(|field| format!("{field}: {} in {}, {} in {}", was[field], names.0, is[field], names.1)).collect()
}

/// What one of two has and the other has not: rates over all attacks are over those that a model has.
fn of_one_alone(
    what: &str,
    done: &str,
    first: (&Evaluation, &[Intended]),
    other: (&Evaluation, &[Intended]),
) -> Vec<String> {
    let alone = |(with, things): (&Evaluation, &[Intended]), (without, others): (&Evaluation, &[Intended])| {
        let missing = things.iter().filter(|one| others.iter().all(|same| same.name != one.name));
        let (with, without) = (model(with), model(without));
        missing
            .map(|one| format!("the {what} {:?} was {done} {with} and not on {without}", one.name))
            .collect::<Vec<_>>()
    };
    [alone(first, other), alone(other, first)].concat()
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
