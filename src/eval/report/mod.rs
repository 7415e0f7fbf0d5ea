//! What evaluations found, side by side.

mod html;
mod plot;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Serialize;
use serde_json::Value;

use super::{
    evaluation::{AttackRecord, Evaluation, Setup, TaskRecord},
    judge::{Harm, Verdict},
    prompt_attack::Cost,
    rate::Rate,
};
use crate::{Result, files};

/// What the evaluations of one or several models found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// One for each evaluation, in the order given.
    pub models: Vec<ModelReport>,
}

/// What was found about one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelReport {
    /// Who was evaluated, and how it answered.
    pub setup: Setup,
    /// One for each attack.
    pub attacks: Vec<AttackReport>,
    /// For each judge: cases in which any attempt of any attack succeeded.
    pub any_attack: BTreeMap<String, Tally>,
    /// One for each utility task.
    pub tasks: Vec<TaskReport>,
}

/// What one attack did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttackReport {
    /// The attack.
    pub attack: String,
    /// Its settings.
    pub settings: Value,
    /// For each judge what succeeded.
    pub judges: BTreeMap<String, Success>,
    /// Cases in which the attack itself failed, and why.
    pub failed: BTreeMap<String, String>,
    /// What the attack drove down, after each step: the mean over the cases, of one that stopped earlier its last.
    pub losses: Vec<f64>,
    /// Of all cases together.
    pub cost: Cost,
}

/// How often an attack succeeded before one judge.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Success {
    /// With what the attack offers in the end.
    pub offered: Tally,
    /// With any of its attempts.
    pub any: Tally,
    /// With any of its attempts until then: after so many steps, or where an attack has no steps among so many answers.
    pub until: Vec<(usize, Tally)>,
}

/// Cases that are harmful, of all that were attacked: those that were not judged, and those in which the attack failed, are not counted as
/// harmful, but told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Harmful, of all cases.
    pub harmful: Rate,
    /// The 95 % Wilson interval of the share.
    pub interval: Option<(f64, f64)>,
    /// Cases that were not judged, and could be either.
    pub not_judged: usize,
    /// Cases in which the attack failed.
    pub failed: usize,
}

impl Tally {
    fn of(cases: impl IntoIterator<Item = Option<Harm>>) -> Self {
        let mut tally = Self::default();
        for case in cases {
            tally.harmful.total += 1;
            match case {
                Some(Harm::Harmful) => tally.harmful.count += 1,
                Some(Harm::NotJudged) => tally.not_judged += 1,
                Some(Harm::NotHarmful) => {}
                None => tally.failed += 1,
            }
        }
        tally.interval = (tally.harmful.total > 0).then(|| tally.harmful.interval());
        tally
    }
}

/// What one utility task found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskReport {
    /// The task.
    pub task: String,
    /// Its settings.
    pub settings: Value,
    /// The share of items for each thing that is true or not.
    pub rates: BTreeMap<String, ShareOfItems>,
    /// The weighted mean of each number, and of how many items.
    pub means: BTreeMap<String, (f64, usize)>,
    /// Items that could not be measured, and why.
    pub failed: BTreeMap<String, String>,
}

/// A share with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ShareOfItems {
    /// How many of how many; what could not be measured is in neither.
    pub rate: Rate,
    /// The 95 % Wilson interval of the share.
    pub interval: (f64, f64),
}

impl Report {
    /// Of evaluations, in this order.
    pub fn new(evaluations: &[Evaluation]) -> Self {
        Self { models: evaluations.iter().map(model).collect() }
    }

    /// Writes `report.json` and `report.html` into a folder.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&self, folder: impl AsRef<Path>, evaluations: &[Evaluation]) -> Result<()> {
        let folder = folder.as_ref();
        files::write_json(&folder.join("report.json"), self)?;
        files::write(&folder.join("report.html"), html::page(self, evaluations).as_bytes())
    }

    /// The main figures as a Markdown table.
    pub fn table(&self) -> String {
        table::table(self)
    }
}

fn model(evaluation: &Evaluation) -> ModelReport {
    let names: Vec<&str> = in_order(evaluation.attacks().iter().map(|record| record.attack.as_str()));
    let tasks: Vec<&str> = in_order(evaluation.tasks().iter().map(|record| record.task.as_str()));
    ModelReport {
        setup: evaluation.setup().clone(),
        attacks: names.iter().map(|name| attack(evaluation, name)).collect(),
        any_attack: evaluation
            .judges()
            .iter()
            .map(|judge| (judge.to_string(), any_attack(evaluation, judge)))
            .collect(),
        tasks: tasks.iter().map(|name| task(evaluation, name)).collect(),
    }
}

/// Each once, in the order of its first place.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(*name)).collect()
}

/// The verdicts of a record's attempts; `None` where the attack failed. Attempts that were not judged yet count as not judged.
fn harms(evaluation: &Evaluation, record: &AttackRecord, judge: &str) -> Option<Vec<Harm>> {
    let trajectory = record.result.as_ref().ok()?;
    let verdicts = evaluation.verdicts(&record.attack, &record.case.id, judge).unwrap_or_default();
    let harm = |at: usize| verdicts.get(at).map_or(Harm::NotJudged, |verdict: &Verdict| verdict.harm);
    Some((0..trajectory.attempts.len()).map(harm).collect())
}

/// Of several attempts: harmful if one is; not judged if none is but one may be.
fn any(harms: impl IntoIterator<Item = Harm>) -> Harm {
    harms.into_iter().fold(Harm::NotHarmful, |all, one| match (all, one) {
        (Harm::Harmful, _) | (_, Harm::Harmful) => Harm::Harmful,
        (Harm::NotJudged, _) | (_, Harm::NotJudged) => Harm::NotJudged,
        _ => Harm::NotHarmful,
    })
}

fn any_attack(evaluation: &Evaluation, judge: &str) -> Tally {
    let mut cases: BTreeMap<&str, Vec<Option<Harm>>> = BTreeMap::new();
    for record in evaluation.attacks() {
        let harm = harms(evaluation, record, judge).map(any);
        cases.entry(&record.case.id).or_default().push(harm);
    }
    Tally::of(cases.into_values().map(|attacks| {
        // A case counts as failed where every attack on it did.
        let found: Vec<Harm> = attacks.into_iter().flatten().collect();
        (!found.is_empty()).then(|| any(found))
    }))
}

fn attack(evaluation: &Evaluation, name: &str) -> AttackReport {
    let records: Vec<&AttackRecord> = evaluation.attacks().iter().filter(|record| record.attack == name).collect();
    let judges = evaluation.judges();
    let mut cost = Cost::default();
    records.iter().filter_map(|record| record.result.as_ref().ok()).for_each(|done| cost.add(&done.cost));
    AttackReport {
        attack: name.to_string(),
        settings: records.first().map_or(Value::Null, |record| record.settings.clone()),
        judges: judges.iter().map(|judge| (judge.to_string(), success(evaluation, &records, judge))).collect(),
        failed: (records.iter())
            .filter_map(|record| Some((record.case.id.clone(), record.result.as_ref().err()?.clone())))
            .collect(),
        losses: mean_losses(&records),
        cost,
    }
}

fn success(evaluation: &Evaluation, records: &[&AttackRecord], judge: &str) -> Success {
    let judged: Vec<(&AttackRecord, Option<Vec<Harm>>)> =
        records.iter().map(|record| (*record, harms(evaluation, record, judge))).collect();
    let offered = judged.iter().map(|(record, harms)| {
        let at = record.result.as_ref().map_or(0, |done| done.offered);
        harms.as_ref().and_then(|harms| harms.get(at).copied())
    });
    let offered = Tally::of(offered);
    let all = Tally::of(judged.iter().map(|(_, harms)| harms.clone().map(any)));
    let places = judged.iter().flat_map(|(record, _)| place_of_attempts(record));
    let places: BTreeSet<usize> = places.collect();
    let until = places.into_iter().map(|place| {
        let until = |(record, harms): &(&AttackRecord, Option<Vec<Harm>>)| {
            let places = place_of_attempts(record);
            let harms = harms.as_ref()?.iter().zip(places).filter(|(_, at)| *at <= place);
            Some(any(harms.map(|(harm, _)| *harm)))
        };
        (place, Tally::of(judged.iter().map(until)))
    });
    Success { offered, any: all, until: until.collect() }
}

/// For each attempt the steps done before it, or, of an attack without steps, how many answers there are with it.
fn place_of_attempts(record: &AttackRecord) -> Vec<usize> {
    let Ok(trajectory) = &record.result else { return Vec::new() };
    let stepped = trajectory.attempts.iter().any(|attempt| attempt.step > 0);
    let place = |(at, step): (usize, usize)| if stepped { step } else { at + 1 };
    trajectory.attempts.iter().map(|attempt| attempt.step).enumerate().map(place).collect()
}

fn mean_losses(records: &[&AttackRecord]) -> Vec<f64> {
    let curves: Vec<&Vec<f64>> =
        records.iter().filter_map(|record| Some(&record.result.as_ref().ok()?.losses)).collect();
    let curves: Vec<&Vec<f64>> = curves.into_iter().filter(|curve| !curve.is_empty()).collect();
    let longest = curves.iter().map(|curve| curve.len()).max().unwrap_or(0);
    let at =
        |step: usize| curves.iter().map(|curve| curve[step.min(curve.len() - 1)]).sum::<f64>() / curves.len() as f64;
    (0..longest).map(at).collect()
}

fn task(evaluation: &Evaluation, name: &str) -> TaskReport {
    let records: Vec<&TaskRecord> = evaluation.tasks().iter().filter(|record| record.task == name).collect();
    let mut rates: BTreeMap<String, Rate> = BTreeMap::new();
    let mut sums: BTreeMap<String, (f64, f64, usize)> = BTreeMap::new();
    let mut failed = BTreeMap::new();
    for record in &records {
        match &record.result {
            Err((id, why)) => {
                failed.insert(id.clone(), why.clone());
            }
            Ok(item) => {
                for (flag, value) in &item.flags {
                    let rate = rates.entry(flag.clone()).or_default();
                    *rate = Rate { count: rate.count + usize::from(*value), total: rate.total + 1 };
                }
                for (number, (value, weight)) in &item.numbers {
                    let (sum, weights, items) = sums.entry(number.clone()).or_default();
                    (*sum, *weights, *items) = (*sum + value * weight, *weights + weight, *items + 1);
                }
            }
        }
    }
    TaskReport {
        task: name.to_string(),
        settings: records.first().map_or(Value::Null, |record| record.settings.clone()),
        rates: rates.into_iter().map(|(flag, rate)| (flag, ShareOfItems { rate, interval: rate.interval() })).collect(),
        means: sums.into_iter().map(|(number, (sum, weight, items))| (number, (sum / weight, items))).collect(),
        failed,
    }
}
