//! What a model should still be good for, as a command line names it.

use std::{
    collections::HashMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
};

use advtrain::{
    ChatFormat, ChatReader, ChatTask, ChoiceTask, Framing, MultipleChoice, QuestionForm, RandomStrings, Request,
    RequestTask, Turns, UtilityTask, encode_chats, load_arc, load_harmless, load_mmlu, load_xstest,
};
use anyhow::{Context, Result, bail};
use clap::Args;

use super::inputs::{spread, stem};

/// Files in the published forms.
#[derive(Clone, Debug, Default, Args)]
pub struct Utility {
    /// What the model should still be good for: arc=JSONL, mmlu=FOLDER with dev and test, xstest=CSV, requests=TEXT
    /// with a harmless request per line, strings=TEXT with the same, a random string behind each, chats=JSONL; several
    /// with commas
    #[arg(long = "utility", value_name = "KIND=PATH", value_delimiter = ',')]
    pub files: Vec<UtilityFile>,
    /// Measure so many items of each, at even distances in the file
    #[arg(long)]
    pub items: Option<NonZeroUsize>,
}

#[derive(Clone, Debug)]
pub struct UtilityFile {
    pub kind: UtilityKind,
    pub path: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UtilityKind {
    Arc,
    Mmlu,
    Xstest,
    Requests,
    Strings,
    Chats,
}

const KINDS: [(&str, UtilityKind); 6] = [
    ("arc", UtilityKind::Arc),
    ("mmlu", UtilityKind::Mmlu),
    ("xstest", UtilityKind::Xstest),
    ("requests", UtilityKind::Requests),
    ("strings", UtilityKind::Strings),
    ("chats", UtilityKind::Chats),
];

impl UtilityKind {
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for UtilityFile {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = text.split_once('=').and_then(|(kind, path)| {
            let (_, kind) = KINDS.iter().find(|(name, _)| *name == kind)?;
            (!path.is_empty()).then(|| Self { kind: *kind, path: path.into() })
        });
        found.ok_or_else(|| "must be KIND=PATH, KIND being arc, mmlu, xstest, requests, strings or chats".into())
    }
}

/// Tasks, and what was found while their files were read.
#[derive(Default)]
pub struct Tasks {
    pub tasks: Vec<Box<dyn UtilityTask>>,
    pub notes: Vec<String>,
    /// The file of each task, by its name.
    files: HashMap<String, PathBuf>,
}

/// Longest chat, in tokens; longer ones are cut.
const CHAT_TOKENS: usize = 1024;
/// Solved questions before each of MMLU's.
const SHOTS: usize = 5;
/// Of the strings that stand behind harmless requests: the same for every model of one tokenizer.
const STRING_SEED: u64 = 1;

/// The tasks of all files; questions and requests in the chat template and without. `context` is the longest text that
/// the model was made for, in tokens.
pub fn read(utility: &Utility, format: &ChatFormat, plain: Framing, context: usize) -> Result<Tasks> {
    let mut found = Tasks::default();
    let most = utility.items.map_or(usize::MAX, NonZeroUsize::get);
    for UtilityFile { kind, path } in &utility.files {
        match kind {
            UtilityKind::Arc => {
                let full = |item| (item, QuestionForm::FullAnswers);
                let items = load_arc(path)?.into_iter().map(full).collect();
                found.questions(&stem(path), path, spread(items, most), plain)?;
            }
            UtilityKind::Mmlu => {
                let items = found.mmlu(path)?;
                found.questions("mmlu", path, spread(items, most), plain)?;
            }
            UtilityKind::Xstest => found.requests("xstest", path, spread(load_xstest(path)?, most), plain)?,
            UtilityKind::Requests => {
                found.requests("harmless requests", path, spread(load_harmless(path)?, most), plain)?;
            }
            UtilityKind::Strings => {
                let requests = behind_strings(spread(load_harmless(path)?, most), format)?;
                let name = "harmless requests behind strings";
                found.add(name, path, Box::new(RequestTask::new(name, requests, Framing::Template)))?;
            }
            UtilityKind::Chats => {
                let (chats, report) =
                    encode_chats(format, ChatReader::open(path)?, CHAT_TOKENS.min(context), Turns::All)?;
                let notes = report.notes.iter().map(|note| format!("{}: {note}", path.display()));
                found.notes.extend(notes);
                let name = "held-out chats";
                found.add(name, path, Box::new(ChatTask::new(name, spread(chats, most))))?;
            }
        }
    }
    Ok(found)
}

impl Tasks {
    fn add(&mut self, name: &str, path: &Path, task: Box<dyn UtilityTask>) -> Result<()> {
        if let Some(other) = self.files.insert(name.to_string(), path.to_path_buf()) {
            let (other, path) = (other.display(), path.display());
            bail!("{other} and {path}: both give a task of the name {name:?}; leave one out, or rename it");
        }
        self.tasks.push(task);
        Ok(())
    }

    fn questions(
        &mut self,
        name: &str,
        path: &Path,
        items: Vec<(MultipleChoice, QuestionForm)>,
        plain: Framing,
    ) -> Result<()> {
        for (name, framing) in framings(name, plain) {
            self.add(&name, path, Box::new(ChoiceTask::new(&name, items.clone(), framing)))?;
        }
        Ok(())
    }

    fn requests(&mut self, name: &str, path: &Path, requests: Vec<Request>, plain: Framing) -> Result<()> {
        for (name, framing) in framings(name, plain) {
            self.add(&name, path, Box::new(RequestTask::new(&name, requests.clone(), framing)))?;
        }
        Ok(())
    }

    /// The test questions of every subject, each behind five solved ones.
    fn mmlu(&mut self, folder: &Path) -> Result<Vec<(MultipleChoice, QuestionForm)>> {
        let test = folder.join("test");
        let entries = fs::read_dir(&test).with_context(|| test.display().to_string())?;
        let mut paths: Vec<PathBuf> =
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>()?;
        paths.sort();
        let mut items = Vec::new();
        for path in paths {
            let name = stem(&path);
            let Some(subject) = name.strip_suffix("_test").filter(|_| path.extension().is_some_and(|end| end == "csv"))
            else {
                self.notes.push(format!("{}: not read, as its name does not end in _test.csv", path.display()));
                continue;
            };
            let dev = folder.join("dev").join(format!("{subject}_dev.csv"));
            let mut examples = load_mmlu(&dev)?;
            if examples.len() < SHOTS {
                let count = examples.len();
                bail!(
                    "{}: holds {count} questions; at least {SHOTS} are needed, to stand solved before each",
                    dev.display()
                );
            }
            examples.truncate(SHOTS);
            let form = QuestionForm::Letters { subject: subject.replace('_', " "), examples };
            items.extend(load_mmlu(&path)?.into_iter().map(|item| (item, form.clone())));
        }
        if items.is_empty() {
            bail!("{}: holds no file whose name ends in _test.csv", test.display());
        }
        Ok(items)
    }
}

/// Requests with a random string behind each, which a model should answer as it does without.
fn behind_strings(mut requests: Vec<Request>, format: &ChatFormat) -> Result<Vec<Request>> {
    let strings = RandomStrings::new(format.tokenizer(), STRING_SEED)?;
    for request in &mut requests {
        strings.put_behind(1.0, &request.id, &mut request.text)?;
    }
    Ok(requests)
}

fn framings(name: &str, plain: Framing) -> [(String, Framing); 2] {
    [(name.to_string(), Framing::Template), (format!("{name} without template"), plain)]
}
