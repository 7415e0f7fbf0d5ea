//! What evaluations found, side by side.

mod alike;
mod answers;
mod html;
mod plot;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Serialize;
use serde_json::Value;

use crate::{Access, AttackRecord, Cost, Evaluation, Harm, Plan, Rate, Result, Setup, TaskRecord, Verdict, files};

/// What the evaluations of one or several models found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// One for each evaluation, in the order given.
    pub models: Vec<ModelReport>,
    /// In what the models were not evaluated alike: cases, settings, templates, answers. Their figures are then not to
    /// be compared without a thought.
    pub differences: Vec<String>,
    /// What failed as a whole, as far as the caller says.
    pub problems: Vec<String>,
}

/// What was found about one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelReport {
    /// Who was evaluated, and how it answered.
    pub setup: Setup,
    /// One for each attack.
    pub attacks: Vec<AttackReport>,
    /// For each judge: cases in which any attempt of any attack succeeded.
    pub any_attack: BTreeMap<String, AnyAttack>,
    /// For each judge how it judged.
    pub judges: BTreeMap<String, JudgeReport>,
    /// One for each utility task.
    pub tasks: Vec<TaskReport>,
}

/// Cases in which any attempt of several attacks succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AnyAttack {
    /// Of those by text.
    pub by_text: Tally,
    /// Of all but those without bound, which are a check and no threat, and answers that were made elsewhere.
    pub by_any: Tally,
    /// The same over those cases alone that each of these attacks was made on without failing: the one to compare where costly
    /// attacks were made on some of the cases.
    pub where_all: Tally,
}

/// How a judge judged.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JudgeReport {
    /// Its settings.
    pub settings: Value,
    /// Wall-clock time.
    pub seconds: f64,
}

/// What one attack did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttackReport {
    /// The attack.
    pub attack: String,
    /// Its settings.
    pub settings: Value,
    /// What it needs.
    pub access: Access,
    /// Cases that it was run on, or was to be.
    pub planned: usize,
    /// Cases that it was run on, failures included.
    pub done: usize,
    /// For each judge what succeeded.
    pub judges: BTreeMap<String, Success>,
    /// Cases in which the attack itself failed, and why.
    pub failed: BTreeMap<String, String>,
    /// What the attack drove down, as [`crate::Trajectory`] has it: the mean over the cases, of one that stopped earlier its last;
    /// in its units.
    pub losses: Vec<f64>,
    /// Of each case; of one that failed the time alone.
    pub costs: BTreeMap<String, Cost>,
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
    /// With any of its attempts until then: after so many steps, or, where the attack has no steps in any case, among
    /// so many answers.
    pub until: Vec<(usize, Tally)>,
}

/// Cases that are harmful, of all that were attacked: those that were not judged, and those in which the attack failed,
/// are not counted as harmful, but told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Harmful, of all cases.
    pub harmful: Rate,
    /// The 95 % Wilson interval of the share.
    pub interval: Option<(f64, f64)>,
    /// Cases that were not judged, and could be either.
    pub not_judged: usize,
    /// Cases in which the attack, or each of several, failed.
    pub failed: usize,
    /// Of several attacks: cases that are not harmful, but on which one of the attacks failed or was not run.
    pub attacked_in_part: usize,
}

impl Tally {
    /// `None`: the attack failed.
    fn of(cases: impl IntoIterator<Item = Option<Harm>>) -> Self {
        let mut tally = Self::default();
        cases.into_iter().for_each(|case| tally.add(case));
        tally.with_interval()
    }

    fn add(&mut self, case: Option<Harm>) {
        self.harmful.total += 1;
        match case {
            Some(Harm::Harmful) => self.harmful.count += 1,
            Some(Harm::NotJudged) => self.not_judged += 1,
            Some(Harm::NotHarmful) => {}
            None => self.failed += 1,
        }
    }

    fn with_interval(self) -> Self {
        Self { interval: (self.harmful.total > 0).then(|| self.harmful.interval()), ..self }
    }
}

/// What one utility task found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskReport {
    /// The task.
    pub task: String,
    /// Its settings.
    pub settings: Value,
    /// Items that were measured, or were to be.
    pub planned: usize,
    /// Items that were measured, failures included.
    pub done: usize,
    /// The share of items for each thing that is true or not.
    pub rates: BTreeMap<String, ShareOfItems>,
    /// The weighted mean of each number, and of how many items; beside a `loss` its exponential, the `perplexity`.
    pub means: BTreeMap<String, (f64, usize)>,
    /// Items that could not be measured, and why.
    pub failed: BTreeMap<String, String>,
    /// Wall-clock time.
    pub seconds: f64,
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
        let models = evaluations.iter().map(model).collect();
        Self { models, differences: alike::differences(evaluations), problems: Vec::new() }
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

    /// The main figures as a Markdown table, and below it what is not alike and what failed.
    pub fn table(&self) -> String {
        let notes = self.notes().into_iter().map(|note| format!("- {note}\n")).collect::<String>();
        let table = table::Table::new(self).markdown();
        if notes.is_empty() { table } else { format!("{table}\n\n{notes}") }
    }

    fn notes(&self) -> Vec<String> {
        let differences = self.differences.iter().map(|difference| format!("not alike: {difference}"));
        differences.chain(self.problems.iter().map(|problem| format!("failed: {problem}"))).collect()
    }
}

fn model(evaluation: &Evaluation) -> ModelReport {
    let judges = evaluation.judges();
    ModelReport {
        setup: evaluation.setup().clone(),
        attacks: attacks(evaluation).iter().map(|attack| attack_report(evaluation, attack)).collect(),
        any_attack: judges.iter().map(|judge| (judge.to_string(), any_attack(evaluation, judge))).collect(),
        judges: judges.iter().map(|judge| (judge.to_string(), judge_report(evaluation, judge))).collect(),
        tasks: tasks(evaluation).iter().map(|task| task_report(evaluation, task)).collect(),
    }
}

/// An attack or task: its name, settings, the ids that it was to do, and what attackers need for it.
struct Intended<'a> {
    name: &'a str,
    settings: &'a Value,
    ids: BTreeSet<&'a str>,
    access: Access,
}

/// The attacks that were planned or made, in the order in which they were.
fn attacks(evaluation: &Evaluation) -> Vec<Intended<'_>> {
    let planned = evaluation.plans().iter().filter_map(|plan| match plan {
        Plan::Attack { attack, settings, access, cases } => {
            let ids = cases.iter().map(String::as_str).collect();
            Some(Intended { name: attack, settings, ids, access: *access })
        }
        _ => None,
    });
    let made = evaluation.attacks().iter().map(|record| Intended {
        name: &record.attack,
        settings: &record.settings,
        ids: BTreeSet::from([record.case.id.as_str()]),
        access: record.access,
    });
    joined(planned.chain(made))
}

/// The same of utility tasks.
fn tasks(evaluation: &Evaluation) -> Vec<Intended<'_>> {
    let access = Access::default();
    let planned = evaluation.plans().iter().filter_map(|plan| match plan {
        Plan::Task { task, settings, items } => {
            let ids = items.iter().map(String::as_str).collect();
            Some(Intended { name: task, settings, ids, access })
        }
        _ => None,
    });
    let made = evaluation.tasks().iter().map(|record| Intended {
        name: &record.task,
        settings: &record.settings,
        ids: BTreeSet::from([record.item()]),
        access,
    });
    joined(planned.chain(made))
}

/// Those of one name as one, with all their ids.
fn joined<'a>(parts: impl Iterator<Item = Intended<'a>>) -> Vec<Intended<'a>> {
    let mut all: Vec<Intended> = Vec::new();
    for part in parts {
        match all.iter_mut().find(|one| one.name == part.name) {
            Some(known) => known.ids.extend(part.ids),
            None => all.push(part),
        }
    }
    all
}

/// Each once, in the order of its first place.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(*name)).collect()
}

/// The verdicts of a record's attempts; `None` where the attack failed. Attempts that were not judged yet count as not
/// judged.
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

fn any_attack(evaluation: &Evaluation, judge: &str) -> AnyAttack {
    let (by_text, _) = any_of_attacks(evaluation, judge, |access| access == Access::Text);
    let of_threats = |access| !matches!(access, Access::Unbounded | Access::Elsewhere);
    let (by_any, where_all) = any_of_attacks(evaluation, judge, of_threats);
    AnyAttack { by_text, by_any, where_all }
}

/// Over the attacks whose access counts: of every case, and of those that each attack was made on.
fn any_of_attacks(evaluation: &Evaluation, judge: &str, counts: fn(Access) -> bool) -> (Tally, Tally) {
    let attacks = attacks(evaluation).into_iter().filter(|attack| counts(attack.access)).count();
    let mut cases: BTreeMap<&str, Vec<Option<Harm>>> = BTreeMap::new();
    for record in evaluation.attacks().iter().filter(|record| counts(record.access)) {
        cases.entry(&record.case.id).or_default().push(harms(evaluation, record, judge).map(any));
    }
    let (mut tally, mut where_all) = (Tally::default(), Tally::default());
    for made in cases.into_values() {
        let found: Vec<Harm> = made.into_iter().flatten().collect();
        // A case counts as failed where every attack on it did.
        let case = (!found.is_empty()).then(|| any(found.iter().copied()));
        tally.add(case);
        let by_all = found.len() == attacks;
        tally.attacked_in_part += usize::from(!by_all && !matches!(case, None | Some(Harm::Harmful)));
        if by_all {
            where_all.add(case);
        }
    }
    (tally.with_interval(), where_all.with_interval())
}

fn judge_report(evaluation: &Evaluation, judge: &str) -> JudgeReport {
    let planned = evaluation.plans().iter().find_map(|plan| match plan {
        Plan::Judge { judge: name, settings } if name == judge => Some(settings.clone()),
        _ => None,
    });
    let mut report = JudgeReport { settings: planned.unwrap_or_default(), seconds: 0.0 };
    for record in evaluation.all_verdicts().filter(|record| record.judge == judge) {
        report.settings = record.settings.clone();
        report.seconds += record.seconds;
    }
    report
}

fn attack_report(evaluation: &Evaluation, attack: &Intended) -> AttackReport {
    let records: Vec<&AttackRecord> =
        evaluation.attacks().iter().filter(|record| record.attack == attack.name).collect();
    let judges = evaluation.judges();
    let costs: BTreeMap<String, Cost> = records.iter().map(|one| (one.case.id.clone(), cost_of(one))).collect();
    let mut cost = Cost::default();
    costs.values().for_each(|one| cost.add(one));
    AttackReport {
        attack: attack.name.to_string(),
        settings: attack.settings.clone(),
        access: attack.access,
        planned: attack.ids.len(),
        done: records.len(),
        judges: judges.iter().map(|judge| (judge.to_string(), success(evaluation, &records, judge))).collect(),
        failed: (records.iter())
            .filter_map(|record| Some((record.case.id.clone(), record.result.as_ref().err()?.clone())))
            .collect(),
        losses: mean_losses(&records),
        costs,
        cost,
    }
}

/// Of an attack that failed only the time is known.
fn cost_of(record: &AttackRecord) -> Cost {
    let failed = Cost { seconds: record.seconds, ..Cost::default() };
    record.result.as_ref().map_or(failed, |trajectory| trajectory.cost)
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
    let stepped = attempts(records).any(|(_, step)| step > 0);
    let place = move |(at, step): (usize, usize)| if stepped { step } else { at + 1 };
    let places: BTreeSet<usize> = attempts(records).map(place).collect();
    let until = places.into_iter().map(|last| {
        let until = |(record, harms): &(&AttackRecord, Option<Vec<Harm>>)| {
            let places = attempts(std::slice::from_ref(record)).map(place);
            let harms = harms.as_ref()?.iter().zip(places).filter(|(_, at)| *at <= last);
            Some(any(harms.map(|(harm, _)| *harm)))
        };
        (last, Tally::of(judged.iter().map(until)))
    });
    Success { offered, any: all, until: until.collect() }
}

/// The number of each attempt on its case, and the steps done before it.
fn attempts<'a>(records: &'a [&AttackRecord]) -> impl Iterator<Item = (usize, usize)> + 'a {
    let done = records.iter().filter_map(|record| record.result.as_ref().ok());
    done.flat_map(|trajectory| trajectory.attempts.iter().map(|attempt| attempt.step).enumerate())
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

/// The number of a task that is a loss in nats per token.
const LOSS: &str = "loss";
const PERPLEXITY: &str = "perplexity";

fn task_report(evaluation: &Evaluation, task: &Intended) -> TaskReport {
    let records: Vec<&TaskRecord> = evaluation.tasks().iter().filter(|record| record.task == task.name).collect();
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
        task: task.name.to_string(),
        settings: task.settings.clone(),
        planned: task.ids.len(),
        done: records.len(),
        rates: rates.into_iter().map(|(flag, rate)| (flag, ShareOfItems { rate, interval: rate.interval() })).collect(),
        means: means(sums),
        failed,
        seconds: records.iter().map(|record| record.seconds).sum(),
    }
}

/// Weighted means from sums, sums of weights and counts; what has no weight has no mean.
fn means(sums: BTreeMap<String, (f64, f64, usize)>) -> BTreeMap<String, (f64, usize)> {
    let weighed = sums.into_iter().filter(|(_, (_, weight, _))| *weight > 0.0);
    let mut means: BTreeMap<_, _> = weighed.map(|(name, (sum, weight, items))| (name, (sum / weight, items))).collect();
    if let Some((loss, items)) = means.get(LOSS).copied().filter(|(loss, _)| loss.exp().is_finite()) {
        means.insert(PERPLEXITY.into(), (loss.exp(), items));
    }
    means
}
