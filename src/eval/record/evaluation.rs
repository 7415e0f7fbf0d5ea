//! One model's evaluation in a folder: what was tried, answered and judged, kept line by line so that nothing is done
//! twice.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::Write,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use serde_json::{Value, json};

use super::{
    records::{AttackRecord, Line, Plan, Records, TaskRecord, VerdictRecord},
    setup::{SETUP, Setup, differences},
};
use crate::{
    Answered, Case, Error, ItemRecord, Judge, Outcome, PromptAttack, Result, Subject, UtilityTask, Verdict, Watch,
    files,
};

/// Where an evaluation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvaluationProgress<'a> {
    /// The attack, judge or task.
    pub doing: &'a str,
    /// Cases or items done, those of an earlier run included.
    pub done: usize,
    /// In all.
    pub of: usize,
    /// Of the case in work, or the cases together: steps done, and in all. They begin again where a group failed and its
    /// halves are tried.
    pub step: (usize, usize),
}

/// Told where an evaluation stands; says whether to go on.
pub type EvaluationWatch<'a> = dyn FnMut(EvaluationProgress) -> ControlFlow<()> + 'a;

/// One model's evaluation.
#[derive(Debug)]
pub struct Evaluation {
    folder: PathBuf,
    setup: Setup,
    records: Records,
    /// None of what was opened to be read.
    journal: Option<Journal>,
}

const RECORDS: &str = "records.jsonl";

/// The file of records, to add to, and the lock that keeps others from it.
#[derive(Debug)]
struct Journal {
    file: File,
    length: u64,
    _lock: File,
}

impl Evaluation {
    /// Begins in a folder, or goes on with what is there. No other process can, until this is dropped.
    ///
    /// # Errors
    /// If another process is at work there, or what is there is of another setup, is not an evaluation's, or cannot be
    /// read or written.
    pub fn open(folder: impl Into<PathBuf>, setup: Setup) -> Result<Self> {
        let folder = folder.into();
        let lock = files::lock(&folder)?;
        let path = folder.join(SETUP);
        if let Some(earlier) = Setup::read(&folder)? {
            check_same(&path, &earlier, &setup)?;
        }
        let (records, whole) = Records::read(&folder.join(RECORDS))?;
        files::write_json(&path, &setup)?;
        let file = append(&folder.join(RECORDS), whole)?;
        Ok(Self { folder, setup, records, journal: Some(Journal { file, length: whole, _lock: lock }) })
    }

    /// Reads what a folder holds, to report on it: nothing there is changed, and what would add to it is an error.
    ///
    /// # Errors
    /// If it is not an evaluation's, or cannot be read.
    pub fn read(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        let setup = files::read_json(&folder.join(SETUP))?;
        let (records, _) = Records::read(&folder.join(RECORDS))?;
        Ok(Self { folder, setup, records, journal: None })
    }

    /// Who is evaluated.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// What attacks did, in the order in which it was done.
    pub fn attacks(&self) -> &[AttackRecord] {
        &self.records.attacks
    }

    /// A judge's verdicts on the attempts of an attack on a case, if it has judged them.
    pub fn verdicts(&self, attack: &str, case: &str, judge: &str) -> Option<&[Verdict]> {
        let key = (attack.into(), case.into(), judge.into());
        self.records.verdicts.get(&key).map(|record| record.verdicts.as_slice())
    }

    /// All verdicts, by attack, case and judge.
    pub fn all_verdicts(&self) -> impl Iterator<Item = &VerdictRecord> {
        self.records.verdicts.values()
    }

    /// The judges that have judged anything, or were to.
    pub fn judges(&self) -> BTreeSet<&str> {
        let planned = self.plans().iter().filter_map(|plan| match plan {
            Plan::Judge { judge, .. } => Some(judge.as_str()),
            _ => None,
        });
        self.records.verdicts.keys().map(|(_, _, judge)| judge.as_str()).chain(planned).collect()
    }

    /// What utility tasks found, in the order in which it was found.
    pub fn tasks(&self) -> &[TaskRecord] {
        &self.records.tasks
    }

    /// What was to be done.
    pub fn plans(&self) -> &[Plan] {
        &self.records.plans
    }

    /// Notes that an attack is to be run on these cases, which [`Evaluation::attack`] does too: said of everything
    /// before anything begins, it finds early what cannot be gone on with, and lets a report tell what is missing.
    ///
    /// # Errors
    /// If the attack has records with other settings, two cases have one id, a case has a record in which it is
    /// another, or the plan cannot be written.
    pub fn plan_attack(&mut self, attack: &dyn PromptAttack, cases: &[Case]) -> Result<()> {
        let (name, settings) = (attack.name(), attack.settings());
        let known = self.attacks().iter().find(|record| record.attack == name).map(|record| &record.settings);
        self.check_settings("attack", &name, known, &settings)?;
        check_unique(cases.iter().map(|case| case.id.as_str()))?;
        self.check_cases(cases)?;
        let cases = cases.iter().map(|case| case.id.clone()).collect();
        self.plan(Plan::Attack { attack: name, settings, access: attack.access(), cases })
    }

    /// Notes that a judge is to judge, which [`Evaluation::judge`] does too.
    ///
    /// # Errors
    /// If the judge has verdicts with other settings, or the plan cannot be written.
    pub fn plan_judge(&mut self, judge: &dyn Judge) -> Result<()> {
        let (name, settings) = (judge.name(), judge.settings());
        let known = self.all_verdicts().find(|record| record.judge == name).map(|record| &record.settings);
        self.check_settings("judge", &name, known, &settings)?;
        self.plan(Plan::Judge { judge: name, settings })
    }

    /// Notes that a task is to be measured, which [`Evaluation::measure`] does too.
    ///
    /// # Errors
    /// If the task has records with other settings, two items have one id, or the plan cannot be written.
    pub fn plan_task(&mut self, task: &dyn UtilityTask) -> Result<()> {
        let (name, settings, items) = (task.name(), task.settings(), task.ids());
        let known = self.tasks().iter().find(|record| record.task == name).map(|record| &record.settings);
        self.check_settings("task", &name, known, &settings)?;
        check_unique(items.iter().map(String::as_str))
            .map_err(|error| error.while_doing(format!("planning {name}")))?;
        self.plan(Plan::Task { task: name, settings, items })
    }

    fn plan(&mut self, plan: Plan) -> Result<()> {
        if self.plans().contains(&plan) { Ok(()) } else { self.write(Line::Plan(plan)) }
    }

    /// Attacks the cases that this attack has no record of, as many together as it takes ([`PromptAttack::at_once`]). Where a
    /// group fails its halves are tried; a case that fails alone has a record that says why.
    ///
    /// # Errors
    /// As [`Evaluation::plan_attack`]; if a record cannot be written.
    pub fn attack(
        &mut self,
        attack: &mut dyn PromptAttack,
        subject: &Subject,
        cases: &[Case],
        watch: &mut EvaluationWatch,
    ) -> Result<ControlFlow<()>> {
        self.plan_attack(attack, cases)?;
        let (name, settings) = (attack.name(), attack.settings());
        let open: Vec<Case> =
            cases.iter().filter(|case| self.records.attack(&name, &case.id).is_none()).cloned().collect();
        let mut done = cases.len() - open.len();
        for group in open.chunks(attack.at_once(subject).max(1)) {
            let mut watch_steps =
                |step, steps| watch(EvaluationProgress { doing: &name, done, of: cases.len(), step: (step, steps) });
            let begin = Instant::now();
            let results = attacked(attack, subject, group, &mut watch_steps);
            let seconds = begin.elapsed().as_secs_f64() / group.len() as f64;
            for (case, result) in group.iter().zip(results) {
                let result = match result {
                    Ok(Outcome::Stopped) => return Ok(ControlFlow::Break(())),
                    Ok(Outcome::Done(trajectory)) => trajectory.check().map(|()| trajectory),
                    Err(why) => Err(why),
                };
                if let Err(why) = &result {
                    tracing::warn!(attack = name, case = case.id, why, "an attack failed");
                }
                let (attack, settings, access) = (name.clone(), settings.clone(), attack.access());
                self.write(Line::Attack(AttackRecord {
                    attack,
                    settings,
                    access,
                    case: case.clone(),
                    seconds,
                    result,
                }))?;
            }
            done += group.len();
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Judges all attempts that this judge has not judged.
    ///
    /// # Errors
    /// As [`Evaluation::plan_judge`]; if the judge fails as a whole, gives another number of verdicts than there are
    /// answers, or a record cannot be written.
    pub fn judge(&mut self, judge: &mut dyn Judge, watch: &mut EvaluationWatch) -> Result<ControlFlow<()>> {
        self.plan_judge(judge)?;
        let (name, settings) = (judge.name(), judge.settings());
        let judged = |record: &&AttackRecord| self.verdicts(&record.attack, &record.case.id, &name).is_some();
        let open: Vec<AttackRecord> = self.attacks().iter().filter(|record| !judged(record)).cloned().collect();
        let of = self.attacks().len();
        for (at, record) in open.iter().enumerate() {
            let done = of - open.len() + at;
            if watch(EvaluationProgress { doing: &name, done, of, step: (0, 1) }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let Ok(trajectory) = &record.result else { continue };
            let begin = Instant::now();
            let case = &record.case;
            let answered = trajectory.attempts.iter().map(|attempt| Answered {
                behavior: &case.behavior,
                context: case.context.as_deref(),
                target: &case.target,
                answer: &attempt.answer,
            });
            let verdicts = judge.judge(&answered.collect::<Vec<_>>())?;
            if verdicts.len() != trajectory.attempts.len() {
                let expected = trajectory.attempts.len();
                return Err(Error::mismatch(format!("verdicts of the judge {name:?}"), expected, verdicts.len()));
            }
            let (attack, case, seconds) = (record.attack.clone(), case.id.clone(), begin.elapsed().as_secs_f64());
            let (judge, settings) = (name.clone(), settings.clone());
            self.write(Line::Verdicts(VerdictRecord { attack, case, judge, settings, seconds, verdicts }))?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Measures the items that this task has no record of.
    ///
    /// # Errors
    /// As [`Evaluation::plan_task`]; if a record cannot be written.
    pub fn measure(
        &mut self,
        task: &mut dyn UtilityTask,
        subject: &Subject,
        watch: &mut EvaluationWatch,
    ) -> Result<ControlFlow<()>> {
        self.plan_task(task)?;
        let (name, settings, ids) = (task.name(), task.settings(), task.ids());
        let known: BTreeSet<&str> = self.tasks().iter().filter(|one| one.task == name).map(TaskRecord::item).collect();
        let open: Vec<usize> = (0..ids.len()).filter(|at| !known.contains(ids[*at].as_str())).collect();
        for (chunk, items) in open.chunks(subject.rows()).enumerate() {
            let done = ids.len() - open.len() + chunk * subject.rows();
            if watch(EvaluationProgress { doing: &name, done, of: ids.len(), step: (0, 1) }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let begin = Instant::now();
            let results = measured(task, subject, items, &ids);
            let seconds = begin.elapsed().as_secs_f64() / items.len() as f64;
            for result in results {
                let (task, settings) = (name.clone(), settings.clone());
                self.write(Line::Task(TaskRecord { task, settings, seconds, result }))?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Forgets what failed, and verdicts of which one is not judged, so that it is tried again.
    ///
    /// # Errors
    /// If the records cannot be written.
    pub fn forget_failed(&mut self) -> Result<()> {
        let path = self.folder.join(RECORDS);
        let Some(journal) = &mut self.journal else { return Err(read_only(&self.folder)) };
        let mut kept = self.records.clone();
        kept.forget_failed();
        let text = kept.lines().map(|line| line.text(&path)).collect::<Result<String>>()?;
        files::write(&path, text.as_bytes())?;
        // From here on the file that the journal had open is no longer in the folder.
        self.records = kept;
        journal.length = text.len() as u64;
        journal.file = append(&path, journal.length)?;
        Ok(())
    }

    fn write(&mut self, line: Line) -> Result<()> {
        let path = self.folder.join(RECORDS);
        let Some(journal) = &mut self.journal else { return Err(read_only(&self.folder)) };
        let text = line.text(&path)?;
        // In the file first: a record that is in memory alone could get verdicts in the file, which then nothing reads.
        let written = journal.file.write_all(text.as_bytes()).map_err(|error| Error::io(&path, error));
        if let Err(error) = written.and_then(|()| self.records.hold(line).map_err(|why| Error::file(&path, why))) {
            // Half a line would make one with the next.
            let _ = journal.file.set_len(journal.length);
            return Err(error);
        }
        journal.length += text.len() as u64;
        Ok(())
    }

    /// A case is the same in every attack of an evaluation.
    fn check_cases(&self, cases: &[Case]) -> Result<()> {
        for case in cases {
            let mut others = self.attacks().iter().filter(|record| record.case.id == case.id && record.case != *case);
            let Some(other) = others.next() else { continue };
            let differing = differences(&json!(other.case), &json!(case), &[]).join("; ");
            let message = format!(
                "the case {:?} has a record of the attack {:?} in which it is another: {differing}; go on with the same \
                 cases, or in another folder",
                case.id, other.attack
            );
            return Err(Error::file(self.folder.join(RECORDS), message));
        }
        Ok(())
    }

    fn check_settings(&self, what: &str, name: &str, known: Option<&Value>, settings: &Value) -> Result<()> {
        match known {
            Some(known) if known != settings => {
                let message = format!(
                    "the {what} {name:?} has records that were made with {known}, and is now {settings}; \
                     go on with the same settings, or in another folder"
                );
                Err(Error::file(self.folder.join(RECORDS), message))
            }
            _ => Ok(()),
        }
    }
}

/// The file to add lines to, what was cut off behind its whole lines being dropped.
fn append(path: &Path, whole: u64) -> Result<File> {
    let at = |error| Error::io(path, error);
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(at)?;
    file.set_len(whole).map_err(at)?;
    Ok(file)
}

fn read_only(folder: &Path) -> Error {
    Error::file(folder, "the evaluation was opened to be read; Evaluation::open opens one to add to")
}

/// Runs things together; if that fails by halves, so that only those fail that must, and what is too large for the memory is
/// tried smaller.
fn by_halves<T, R>(
    things: &[T],
    run: &mut dyn FnMut(&[T]) -> Result<Vec<R>>,
    failed: &dyn Fn(&T, String) -> R,
) -> Vec<R> {
    match (run(things), things) {
        (Ok(results), _) => results,
        (Err(error), [only]) => vec![failed(only, error.to_string())],
        (Err(error), _) => {
            tracing::debug!(together = things.len(), %error, "failed together; trying halves");
            let halves = things.chunks(things.len().div_ceil(2).max(1));
            halves.flat_map(|half| by_halves(half, run, failed)).collect()
        }
    }
}

fn attacked(
    attack: &mut dyn PromptAttack,
    subject: &Subject,
    cases: &[Case],
    watch: &mut Watch,
) -> Vec<std::result::Result<Outcome, String>> {
    let mut run = |cases: &[Case]| {
        let outcomes = attack.attack_together(subject, cases, watch)?;
        if outcomes.len() == cases.len() {
            return Ok(outcomes.into_iter().map(Ok).collect());
        }
        let why = format!("the attack was run on {} cases and returned {} outcomes", cases.len(), outcomes.len());
        Ok(vec![Err(why); cases.len()])
    };
    by_halves(cases, &mut run, &|_, why| Err(why))
}

fn measured(
    task: &mut dyn UtilityTask,
    subject: &Subject,
    items: &[usize],
    ids: &[String],
) -> Vec<std::result::Result<ItemRecord, (String, String)>> {
    let failed = |item: &usize, why: String| Err((ids[*item].clone(), why));
    let mut run = |items: &[usize]| {
        let found = task.measure(subject, items)?;
        if found.iter().map(|one| &one.id).eq(items.iter().map(|item| &ids[*item])) {
            return Ok(found.into_iter().map(finite).collect());
        }
        let found: Vec<String> = found.into_iter().map(|one| one.id).collect();
        let why = format!("the task was asked for {} items in their order and returned {found:?}", items.len());
        Ok(items.iter().map(|item| failed(item, why.clone())).collect())
    };
    by_halves(items, &mut run, &failed)
}

/// JSON has no other numbers.
fn finite(item: ItemRecord) -> std::result::Result<ItemRecord, (String, String)> {
    match item.numbers.iter().find(|(_, (value, weight))| !value.is_finite() || !weight.is_finite()) {
        Some((name, (value, _))) => Err((item.id.clone(), format!("{name} is {value}, not a finite number"))),
        None => Ok(item),
    }
}

fn check_unique<'a>(ids: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(Error::example(id, "is there twice; ids must be unique"));
        }
    }
    Ok(())
}

/// An error that names the fields in which two setups differ.
fn check_same(path: &Path, was: &Setup, is: &Setup) -> Result<()> {
    let differing = was.differences(is);
    if differing.is_empty() {
        return Ok(());
    }
    let message = format!("the folder holds another evaluation: {}; choose another folder", differing.join("; "));
    Err(Error::file(path, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attempt, Trajectory};

    /// Else a judge of this process could put a verdict on it into the file, and no later one could read that.
    #[test]
    fn what_could_not_be_written_is_not_held_either() {
        let folder = tempfile::tempdir().unwrap();
        let setup = json!({
            "model": "", "weights": "", "adapter": null, "template": "", "rendered": "", "date": null, "dtype": "float32",
            "generation": {"max_new_tokens": 1, "end_ids": [], "sampling": null}, "version": "", "libtorch": "",
            "device": "cpu", "rows": 1,
            "inputs": {"settings": "", "files": [], "category": null, "cases": 1, "left_out": {}, "notes": []}
        });
        let mut evaluation = Evaluation::open(folder.path(), serde_json::from_value(setup).unwrap()).unwrap();
        let attempt = Attempt { step: 0, stream: 0, messages: Vec::new(), loss: None, answer: String::new() };
        let record = json!({
            "attack": "one", "settings": null, "access": "text", "seconds": 0.0,
            "result": {"Ok": Trajectory { attempts: vec![attempt], ..Trajectory::default() }},
            "case": {"id": "a", "behavior": "", "context": null, "target": "", "messages": []}
        });
        let line = || Line::Attack(serde_json::from_value(record.clone()).unwrap());
        let path = folder.path().join(RECORDS);
        let writable = std::mem::replace(&mut evaluation.journal.as_mut().unwrap().file, File::open(&path).unwrap());
        let message = evaluation.write(line()).unwrap_err().to_string();
        assert!(message.contains(RECORDS) && evaluation.attacks().is_empty(), "{message}");
        evaluation.journal.as_mut().unwrap().file = writable;
        evaluation.write(line()).unwrap();
        // Nor is what is refused written.
        evaluation.write(line()).unwrap_err();
        assert_eq!(Evaluation::read(folder.path()).unwrap().attacks(), evaluation.attacks());
    }
}
