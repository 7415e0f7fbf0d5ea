//! What an evaluation keeps, line by line.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Access, Case, Error, Harm, ItemRecord, Result, Trajectory, Verdict};

/// What an attack did on one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttackRecord {
    /// [`crate::PromptAttack::name`].
    pub attack: String,
    /// [`crate::PromptAttack::settings`].
    pub settings: Value,
    /// [`crate::PromptAttack::access`].
    pub access: Access,
    /// What was attacked.
    pub case: Case,
    /// Wall-clock time, of an attack that failed too: of cases that were attacked together an equal share.
    pub seconds: f64,
    /// What came of it, or why nothing did.
    pub result: std::result::Result<Trajectory, String>,
}

/// A judge's verdicts on the attempts of one attack on one case, in their order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerdictRecord {
    /// The attack.
    pub attack: String,
    /// The case's id.
    pub case: String,
    /// [`crate::Judge::name`].
    pub judge: String,
    /// [`crate::Judge::settings`].
    pub settings: Value,
    /// Wall-clock time.
    pub seconds: f64,
    /// One for each attempt.
    pub verdicts: Vec<Verdict>,
}

/// What a utility task found for one of its items.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// [`crate::UtilityTask::name`].
    pub task: String,
    /// [`crate::UtilityTask::settings`].
    pub settings: Value,
    /// Wall-clock time: of items that were measured together an equal share.
    pub seconds: f64,
    /// What was found, or the item's id and why nothing was.
    pub result: std::result::Result<ItemRecord, (String, String)>,
}

impl TaskRecord {
    /// The item's id.
    pub fn item(&self) -> &str {
        match &self.result {
            Ok(item) => &item.id,
            Err((id, _)) => id,
        }
    }
}

/// What is to be done, kept before it begins: a report tells from it what is missing. A later plan takes the place of
/// an earlier one of that name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plan {
    /// An attack on cases.
    Attack {
        /// The attack.
        attack: String,
        /// Its settings.
        settings: Value,
        /// What it needs.
        access: Access,
        /// The ids of the cases.
        cases: Vec<String>,
    },
    /// A judge of all that attacks do.
    Judge {
        /// The judge.
        judge: String,
        /// Its settings.
        settings: Value,
    },
    /// A utility task.
    Task {
        /// The task.
        task: String,
        /// Its settings.
        settings: Value,
        /// The ids of its items.
        items: Vec<String>,
    },
}

impl Plan {
    /// Whose plan it is: another of that kind and name takes its place.
    fn key(&self) -> (u8, &str) {
        match self {
            Self::Attack { attack, .. } => (0, attack),
            Self::Judge { judge, .. } => (1, judge),
            Self::Task { task, .. } => (2, task),
        }
    }
}

/// A line of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    Attack(AttackRecord),
    Verdicts(VerdictRecord),
    Task(TaskRecord),
    Plan(Plan),
}

impl Line {
    pub(super) fn text(&self, path: &Path) -> Result<String> {
        let text = serde_json::to_string(self).map_err(|error| Error::file(path, error.to_string()))?;
        Ok(text + "\n")
    }
}

/// All lines of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub(super) attacks: Vec<AttackRecord>,
    /// By attack, case and judge.
    pub(super) verdicts: BTreeMap<(String, String, String), VerdictRecord>,
    pub(super) tasks: Vec<TaskRecord>,
    pub(super) plans: Vec<Plan>,
    /// Attacks with their cases, and tasks with their items.
    seen: BTreeSet<(bool, String, String)>,
}

impl Records {
    /// The records of a file, and how many bytes they fill: a last line that was cut off is left out. None where there
    /// is no file.
    pub(super) fn read(path: &Path) -> Result<(Self, u64)> {
        let mut records = Self::default();
        if !path.exists() {
            return Ok((records, 0));
        }
        let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = bytes[..whole].split(|byte| *byte == b'\n').enumerate();
        for (at, line) in lines.filter(|(_, line)| !line.is_empty()) {
            let wrong = |why: String| Error::file(path, format!("line {}: {why}", at + 1));
            let line = serde_json::from_slice(line)
                .map_err(|error| wrong(format!("not a record of an evaluation: {error}")))?;
            records.hold(line).map_err(wrong)?;
        }
        Ok((records, whole as u64))
    }

    /// Takes a line up, or says why it cannot stand beside those before it.
    pub(super) fn hold(&mut self, line: Line) -> std::result::Result<(), String> {
        match line {
            Line::Plan(plan) => {
                match self.plans.iter_mut().find(|one| one.key() == plan.key()) {
                    Some(earlier) => *earlier = plan,
                    None => self.plans.push(plan),
                }
                return Ok(());
            }
            Line::Attack(record) => {
                if let Ok(trajectory) = &record.result {
                    trajectory.check().map_err(|why| format!("{:?} on {:?}: {why}", record.attack, record.case.id))?;
                }
                self.once(true, "attack", &record.attack, &record.case.id)?;
                self.attacks.push(record);
            }
            Line::Task(record) => {
                self.once(false, "task", &record.task, record.item())?;
                self.tasks.push(record);
            }
            Line::Verdicts(record) => self.hold_verdicts(record)?,
        }
        Ok(())
    }

    fn once(&mut self, attack: bool, what: &str, name: &str, id: &str) -> std::result::Result<(), String> {
        if self.seen.insert((attack, name.to_string(), id.to_string())) {
            return Ok(());
        }
        Err(format!("a second record of the {what} {name:?} on {id:?}; there may be one"))
    }

    fn hold_verdicts(&mut self, record: VerdictRecord) -> std::result::Result<(), String> {
        let VerdictRecord { attack, case, judge, verdicts, .. } = &record;
        let of = format!("verdicts of {judge:?} on the attack {attack:?} on {case:?}");
        let attempts = self
            .attack(attack, case)
            .and_then(|record| Some(record.result.as_ref().ok()?.attempts.len()))
            .ok_or_else(|| format!("{of}, of which there is no record"))?;
        if attempts != verdicts.len() {
            return Err(format!("{} {of}; it has {attempts} attempts", verdicts.len()));
        }
        let key = (attack.clone(), case.clone(), judge.clone());
        if self.verdicts.contains_key(&key) {
            return Err(format!("a second line of {of}; there may be one"));
        }
        self.verdicts.insert(key, record);
        Ok(())
    }

    /// The record of an attack on a case.
    pub(super) fn attack(&self, attack: &str, case: &str) -> Option<&AttackRecord> {
        self.attacks.iter().find(|record| record.attack == attack && record.case.id == case)
    }

    /// Drops what failed and verdicts that leave an attempt not judged.
    pub(super) fn forget_failed(&mut self) {
        self.attacks.retain(|record| record.result.is_ok());
        self.tasks.retain(|record| record.result.is_ok());
        self.verdicts.retain(|_, record| record.verdicts.iter().all(|verdict| verdict.harm != Harm::NotJudged));
        let attacks = self.attacks.iter().map(|record| (true, record.attack.clone(), record.case.id.clone()));
        let tasks = self.tasks.iter().map(|record| (false, record.task.clone(), record.item().to_string()));
        self.seen = attacks.chain(tasks).collect();
    }

    /// Everything as lines, in an order in which it can be read.
    pub(super) fn lines(&self) -> impl Iterator<Item = Line> + '_ {
        let plans = self.plans.iter().cloned().map(Line::Plan);
        let attacks = self.attacks.iter().cloned().map(Line::Attack);
        let verdicts = self.verdicts.values().cloned().map(Line::Verdicts);
        plans.chain(attacks).chain(verdicts).chain(self.tasks.iter().cloned().map(Line::Task))
    }
}
