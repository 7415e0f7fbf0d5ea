//! One model's evaluation in a folder: what was tried, answered and judged, kept line by line so that nothing is done twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::Write,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    case::{Case, Subject},
    judge::{Answered, Judge, Verdict},
    prompt_attack::{Access, Outcome, PromptAttack, Trajectory},
    utility::{ItemRecord, UtilityTask},
};
use crate::{Error, Result, TrainableLm, digest::bytes_digest, files};

/// Who is evaluated, and how it answers: an evaluation goes on only with the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// The model's name in reports.
    pub model: String,
    /// What tells its weights from others: [`crate::TrainableLm::fingerprint`], and of an adapter what the caller knows.
    pub weights: String,
    /// [`crate::ChatTemplate::hash`] of the chat template.
    pub template: String,
    /// What the model computes in.
    pub dtype: String,
    /// How answers are made.
    pub generation: crate::Generation,
    /// This crate's version.
    pub version: String,
}

impl Setup {
    /// Of a model that was loaded from files, its adapter's included.
    ///
    /// # Errors
    /// If the adapter's weights cannot be read, or libtorch fails.
    pub fn of_model(
        name: impl Into<String>,
        model: &impl TrainableLm,
        adapter: Option<&Path>,
        subject: &Subject,
    ) -> Result<Self> {
        let mut weights = model.fingerprint()?;
        if let Some(folder) = adapter {
            let path = folder.join("adapter_model.safetensors");
            let bytes = fs::read(&path).map_err(|error| Error::io(&path, error))?;
            weights = format!("{}+{}", &weights[..weights.len().min(16)], bytes_digest(&bytes));
        }
        Ok(Self::new(name, weights, subject))
    }

    /// Of a subject.
    pub fn new(model: impl Into<String>, weights: impl Into<String>, subject: &Subject) -> Self {
        Self {
            model: model.into(),
            weights: weights.into(),
            template: subject.format().template().hash(),
            dtype: format!("{:?}", subject.model().kind()).to_lowercase(),
            generation: subject.generation().clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// What an attack did on one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttackRecord {
    /// [`PromptAttack::name`].
    pub attack: String,
    /// [`PromptAttack::settings`].
    pub settings: Value,
    /// [`PromptAttack::access`].
    pub access: Access,
    /// What was attacked.
    pub case: Case,
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
    /// [`Judge::name`].
    pub judge: String,
    /// [`Judge::settings`].
    pub settings: Value,
    /// One for each attempt.
    pub verdicts: Vec<Verdict>,
}

/// What a utility task found for one of its items.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// [`UtilityTask::name`].
    pub task: String,
    /// [`UtilityTask::settings`].
    pub settings: Value,
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

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Attack(AttackRecord),
    Verdicts(VerdictRecord),
    Task(TaskRecord),
}

/// Where an evaluation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvaluationProgress<'a> {
    /// The attack, judge or task.
    pub doing: &'a str,
    /// Cases or items done, those of an earlier run included.
    pub done: usize,
    /// In all.
    pub of: usize,
    /// Of the case in work: steps done, and in all.
    pub step: (usize, usize),
}

/// Told where an evaluation stands; says whether to go on.
pub type EvaluationWatch<'a> = dyn FnMut(EvaluationProgress) -> ControlFlow<()> + 'a;

/// One model's evaluation.
#[derive(Debug)]
pub struct Evaluation {
    folder: PathBuf,
    setup: Setup,
    file: File,
    attacks: Vec<AttackRecord>,
    verdicts: BTreeMap<(String, String, String), VerdictRecord>,
    tasks: Vec<TaskRecord>,
}

const SETUP: &str = "setup.json";
const RECORDS: &str = "records.jsonl";

impl Evaluation {
    /// Begins in a folder, or goes on with what is there.
    ///
    /// # Errors
    /// If what is there is of another setup, is not an evaluation's, or cannot be read or written.
    pub fn open(folder: impl Into<PathBuf>, setup: Setup) -> Result<Self> {
        let folder = folder.into();
        let path = folder.join(SETUP);
        if path.exists() {
            check_same(&path, &files::read_json(&path)?, &setup)?;
        } else {
            files::write_json(&path, &setup)?;
        }
        let path = folder.join(RECORDS);
        let (lines, whole) = if path.exists() { read_lines(&path)? } else { (Vec::new(), 0) };
        let at = |error| Error::io(&path, error);
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(at)?;
        // What was cut off in the middle of a line is done again.
        file.set_len(whole).map_err(at)?;
        let mut evaluation =
            Self { folder, setup, file, attacks: Vec::new(), verdicts: BTreeMap::new(), tasks: Vec::new() };
        lines.into_iter().for_each(|line| evaluation.hold(line));
        Ok(evaluation)
    }

    /// Reads what a folder holds, to report on it.
    ///
    /// # Errors
    /// If it is not an evaluation's, or cannot be read.
    pub fn read(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        let setup = files::read_json(&folder.join(SETUP))?;
        Self::open(folder, setup)
    }

    /// Who is evaluated.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// What attacks did, in the order in which it was done.
    pub fn attacks(&self) -> &[AttackRecord] {
        &self.attacks
    }

    /// A judge's verdicts on the attempts of an attack on a case, if it has judged them.
    pub fn verdicts(&self, attack: &str, case: &str, judge: &str) -> Option<&[Verdict]> {
        let key = (attack.into(), case.into(), judge.into());
        self.verdicts.get(&key).map(|record| record.verdicts.as_slice())
    }

    /// The judges that have judged anything.
    pub fn judges(&self) -> BTreeSet<&str> {
        self.verdicts.keys().map(|(_, _, judge)| judge.as_str()).collect()
    }

    /// What utility tasks found, in the order in which it was found.
    pub fn tasks(&self) -> &[TaskRecord] {
        &self.tasks
    }

    /// Attacks the cases that this attack has no record of. A case whose attack fails has a record that says why.
    ///
    /// # Errors
    /// If the attack has records with other settings, two cases have one id, or a record cannot be written.
    pub fn attack(
        &mut self,
        attack: &mut dyn PromptAttack,
        subject: &Subject,
        cases: &[Case],
        watch: &mut EvaluationWatch,
    ) -> Result<ControlFlow<()>> {
        let (name, settings) = (attack.name(), attack.settings());
        self.check_attack(&name, &settings)?;
        check_unique(cases.iter().map(|case| case.id.as_str()))?;
        for (done, case) in cases.iter().enumerate() {
            if self.attacks.iter().any(|record| record.attack == name && record.case.id == case.id) {
                continue;
            }
            let mut watch_steps =
                |step, steps| watch(EvaluationProgress { doing: &name, done, of: cases.len(), step: (step, steps) });
            let result = match attack.attack(subject, case, &mut watch_steps) {
                Ok(Outcome::Stopped) => return Ok(ControlFlow::Break(())),
                Ok(Outcome::Done(trajectory)) if trajectory.is_finite() => Ok(trajectory),
                Ok(Outcome::Done(_)) => Err("a loss is not a finite number".to_string()),
                Err(error) => {
                    tracing::warn!(attack = name, case = case.id, %error, "an attack failed");
                    Err(error.to_string())
                }
            };
            let (name, settings, case) = (name.clone(), settings.clone(), case.clone());
            self.write(Line::Attack(AttackRecord { attack: name, settings, access: attack.access(), case, result }))?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Judges all attempts that this judge has not judged.
    ///
    /// # Errors
    /// If the judge fails as a whole, gives another number of verdicts than there are answers, or a record cannot be written.
    pub fn judge(&mut self, judge: &mut dyn Judge, watch: &mut EvaluationWatch) -> Result<ControlFlow<()>> {
        let (name, settings) = (judge.name(), judge.settings());
        let judged = |record: &&AttackRecord| self.verdicts(&record.attack, &record.case.id, &name).is_some();
        let open: Vec<AttackRecord> = self.attacks.iter().filter(|record| !judged(record)).cloned().collect();
        let of = self.attacks.len();
        for (at, record) in open.iter().enumerate() {
            let done = of - open.len() + at;
            if watch(EvaluationProgress { doing: &name, done, of, step: (0, 1) }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let Ok(trajectory) = &record.result else { continue };
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
            let (attack, case, name) = (record.attack.clone(), case.id.clone(), name.clone());
            let settings = settings.clone();
            self.write(Line::Verdicts(VerdictRecord { attack, case, judge: name, settings, verdicts }))?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Measures the items that this task has no record of.
    ///
    /// # Errors
    /// If the task has records with other settings, two items have one id, or a record cannot be written.
    pub fn measure(
        &mut self,
        task: &mut dyn UtilityTask,
        subject: &Subject,
        watch: &mut EvaluationWatch,
    ) -> Result<ControlFlow<()>> {
        let (name, settings, ids) = (task.name(), task.settings(), task.ids());
        self.check_task(&name, &settings)?;
        check_unique(ids.iter().map(String::as_str))?;
        let known: BTreeSet<&str> = self.tasks.iter().filter(|one| one.task == name).map(TaskRecord::item).collect();
        let open: Vec<usize> = (0..ids.len()).filter(|at| !known.contains(ids[*at].as_str())).collect();
        for (chunk, items) in open.chunks(subject.rows()).enumerate() {
            let done = ids.len() - open.len() + chunk * subject.rows();
            if watch(EvaluationProgress { doing: &name, done, of: ids.len(), step: (0, 1) }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            for result in self.items(task, subject, items, &ids) {
                let (task, settings) = (name.clone(), settings.clone());
                self.write(Line::Task(TaskRecord { task, settings, result }))?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Items together; if that fails one by one, so that only those fail that must.
    fn items(
        &self,
        task: &mut dyn UtilityTask,
        subject: &Subject,
        items: &[usize],
        ids: &[String],
    ) -> Vec<std::result::Result<ItemRecord, (String, String)>> {
        match task.measure(subject, items) {
            Ok(found) if found.len() == items.len() => found.into_iter().map(finite).collect(),
            Ok(found) => {
                let why = format!("{} results for {} items", found.len(), items.len());
                items.iter().map(|item| Err((ids[*item].clone(), why.clone()))).collect()
            }
            Err(error) if items.len() == 1 => vec![Err((ids[items[0]].clone(), error.to_string()))],
            Err(_) => items.iter().flat_map(|item| self.items(task, subject, &[*item], ids)).collect(),
        }
    }

    /// Forgets what failed, so that it is tried again.
    ///
    /// # Errors
    /// If the records cannot be written.
    pub fn forget_failed(&mut self) -> Result<()> {
        self.attacks.retain(|record| record.result.is_ok());
        self.tasks.retain(|record| record.result.is_ok());
        let attacks = self.attacks.iter().cloned().map(Line::Attack);
        let verdicts = self.verdicts.values().cloned().map(Line::Verdicts);
        let lines = attacks.chain(verdicts).chain(self.tasks.iter().cloned().map(Line::Task));
        let path = self.folder.join(RECORDS);
        let text = lines.map(|line| json_line(&path, &line)).collect::<Result<String>>()?;
        files::write(&path, text.as_bytes())?;
        self.file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(())
    }

    fn write(&mut self, line: Line) -> Result<()> {
        let path = self.folder.join(RECORDS);
        let text = json_line(&path, &line)?;
        self.file.write_all(text.as_bytes()).map_err(|error| Error::io(&path, error))?;
        self.hold(line);
        Ok(())
    }

    fn hold(&mut self, line: Line) {
        match line {
            Line::Attack(record) => self.attacks.push(record),
            Line::Task(record) => self.tasks.push(record),
            Line::Verdicts(record) => {
                let key = (record.attack.clone(), record.case.clone(), record.judge.clone());
                self.verdicts.insert(key, record);
            }
        }
    }

    fn check_attack(&self, name: &str, settings: &Value) -> Result<()> {
        let known = self.attacks.iter().find(|record| record.attack == name).map(|record| &record.settings);
        self.check_settings("attack", name, known, settings)
    }

    fn check_task(&self, name: &str, settings: &Value) -> Result<()> {
        let known = self.tasks.iter().find(|record| record.task == name).map(|record| &record.settings);
        self.check_settings("task", name, known, settings)
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

/// JSON has no other numbers.
fn finite(item: ItemRecord) -> std::result::Result<ItemRecord, (String, String)> {
    match item.numbers.iter().find(|(_, (value, weight))| !value.is_finite() || !weight.is_finite()) {
        Some((name, (value, _))) => Err((item.id.clone(), format!("{name} is {value}, not a finite number"))),
        None => Ok(item),
    }
}

fn json_line(path: &Path, line: &Line) -> Result<String> {
    let text = serde_json::to_string(line).map_err(|error| Error::file(path, error.to_string()))?;
    Ok(text + "\n")
}

/// The records of a file, and how many bytes they fill: a last line that was cut off is left out.
fn read_lines(path: &Path) -> Result<(Vec<Line>, u64)> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let lines = bytes[..whole].split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    let parse = |(at, line): (usize, &[u8])| {
        serde_json::from_slice(line)
            .map_err(|error| Error::file(path, format!("line {}: not a record of an evaluation: {error}", at + 1)))
    };
    Ok((lines.map(parse).collect::<Result<_>>()?, whole as u64))
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

/// An error that names the first field in which two setups differ.
fn check_same(path: &Path, was: &Setup, is: &Setup) -> Result<()> {
    if was == is {
        return Ok(());
    }
    let value = |setup: &Setup| serde_json::to_value(setup).unwrap_or_default();
    let (was, is) = (value(was), value(is));
    let fields = is.as_object().into_iter().flat_map(|fields| fields.iter());
    let differing = fields.filter(|(name, value)| was.get(name.as_str()) != Some(value));
    let differing: Vec<String> =
        differing.map(|(name, value)| format!("{name} was {} and is {value}", was[name.as_str()])).collect();
    let message = format!("the folder holds another evaluation: {}; choose another folder", differing.join("; "));
    Err(Error::file(path, message))
}
