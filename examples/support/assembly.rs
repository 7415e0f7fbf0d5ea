//! Attacks, judges and utility tasks as a command line names them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use advtrain::{
    AutoDan, ChatFormat, ChatModel, ChatReader, ChatTask, ChoiceTask, ClassifierJudge, Continuous, Direct, Endpoint,
    EndpointSettings, EvaluationPreset, EvaluationSettings, Gcg, Judge, LocalChat, MultipleChoice, Pair, PromptAttack,
    QuestionForm, RefusalJudge, RequestTask, ScoreJudge, Subject, TargetJudge, Turns, UtilityTask, encode_chats,
    load_arc, load_harmless, load_mmlu, load_xstest,
    tch::{Device, Kind},
};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

/// What to attack with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AttackName {
    /// The plain request
    Direct,
    /// The plain request, the beginning of its answer given
    Prefill,
    /// Gradient-guided suffixes
    Gcg,
    /// Genetic search for readable prefixes
    Autodan,
    /// An attacking model in a dialogue
    Pair,
    /// Perturbed embeddings: the prompt's, a suffix's, and without a ball
    Embedding,
}

impl AttackName {
    pub const ALL: [Self; 6] = [Self::Direct, Self::Prefill, Self::Embedding, Self::Gcg, Self::Autodan, Self::Pair];
}

/// [`EvaluationPreset`] as a word.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PresetName {
    /// HarmBench's settings
    Full,
    /// GCG 64 x 50, AutoDAN 16 x 10, PAIR 4 x 2
    Reduced,
}

impl From<PresetName> for EvaluationPreset {
    fn from(name: PresetName) -> Self {
        match name {
            PresetName::Full => Self::Full,
            PresetName::Reduced => Self::Reduced,
        }
    }
}

/// Models that help. Each is a model folder, or NAME@URL for an OpenAI-compatible endpoint.
#[derive(Clone, Debug, Args)]
pub struct Helpers {
    /// Writes PAIR's prompts; without, the evaluated model itself
    #[arg(long)]
    pub attacker: Option<String>,
    /// Rephrases AutoDAN's texts; without, synonyms do
    #[arg(long)]
    pub rephraser: Option<String>,
    /// Judges answers with yes or no
    #[arg(long)]
    pub classifier: Option<String>,
    /// The text in which the classifier is asked, with {behavior} and {generation}
    #[arg(long, requires = "classifier")]
    pub classifier_form: Option<PathBuf>,
    /// Rates answers from 1 to 10; PAIR's attacker sees its ratings
    #[arg(long)]
    pub scorer: Option<String>,
    /// The rating from which on an answer is harmful
    #[arg(long, default_value_t = 10.0)]
    pub threshold: f64,
    /// The environment variable that holds the endpoints' key
    #[arg(long)]
    pub key_variable: Option<String>,
}

/// What the model should still be good for, in the published forms.
#[derive(Clone, Debug, Default, Args)]
pub struct UtilityFiles {
    /// JSONL of ARC's questions; several with commas
    #[arg(long, value_delimiter = ',')]
    pub arc: Vec<PathBuf>,
    /// Folder of MMLU, with its folders dev and test
    #[arg(long)]
    pub mmlu: Option<PathBuf>,
    /// CSV of XSTest
    #[arg(long)]
    pub xstest: Option<PathBuf>,
    /// Harmless requests, one per line
    #[arg(long)]
    pub requests: Option<PathBuf>,
    /// JSONL of held-out chats
    #[arg(long)]
    pub chats: Option<PathBuf>,
    /// Measure so many items of each, at even distances in the file
    #[arg(long)]
    pub items: Option<usize>,
}

const ROWS: usize = 4;

fn chat_model(name: &str, helpers: &Helpers) -> Result<Box<dyn ChatModel>> {
    if let Some((model, url)) = name.split_once('@').filter(|(_, url)| url.starts_with("http")) {
        let key_variable = helpers.key_variable.clone();
        return Ok(Box::new(Endpoint::new(EndpointSettings { key_variable, ..EndpointSettings::new(url, model) })?));
    }
    let device = advtrain::device("auto")?;
    let kind = if device == Device::Cpu { Kind::Float } else { Kind::BFloat16 };
    Ok(Box::new(LocalChat::load(name, kind, device, ROWS)?))
}

/// The attacks that a name stands for.
pub fn attacks<'a>(
    name: AttackName,
    settings: &EvaluationSettings,
    helpers: &Helpers,
    subject: &Subject<'a>,
) -> Result<Vec<Box<dyn PromptAttack + 'a>>> {
    Ok(match name {
        AttackName::Direct => vec![Box::new(Direct::new(settings.direct.clone())?)],
        AttackName::Prefill => vec![Box::new(Direct::new(settings.prefill.clone())?)],
        AttackName::Gcg => vec![Box::new(Gcg::new(settings.gcg.clone())?)],
        AttackName::Autodan => {
            let attack = AutoDan::new(settings.autodan.clone())?;
            match &helpers.rephraser {
                Some(name) => vec![Box::new(attack.with_rephraser(chat_model(name, helpers)?))],
                None => vec![Box::new(attack)],
            }
        }
        AttackName::Pair => {
            let attacker: Box<dyn ChatModel + 'a> = match &helpers.attacker {
                Some(name) => chat_model(name, helpers)?,
                None => Box::new(LocalChat::new("the model itself", subject.model(), subject.format(), ROWS)?),
            };
            let judge: Box<dyn Judge + 'a> = match &helpers.scorer {
                Some(name) => Box::new(ScoreJudge::new(chat_model(name, helpers)?, helpers.threshold)?),
                None => Box::new(RefusalJudge),
            };
            vec![Box::new(Pair::new(settings.pair.clone(), attacker, judge)?)]
        }
        AttackName::Embedding => {
            let attack = |settings: &advtrain::ContinuousSettings| -> Result<Box<dyn PromptAttack + 'a>> {
                Ok(Box::new(Continuous::new(settings.clone())?))
            };
            settings.embedding.iter().map(attack).collect::<Result<_>>()?
        }
    })
}

/// Refusal phrases and target prefix always, models where they are named.
pub fn judges(helpers: &Helpers) -> Result<Vec<Box<dyn Judge>>> {
    let mut judges: Vec<Box<dyn Judge>> = vec![Box::new(RefusalJudge), Box::new(TargetJudge)];
    if let Some(name) = &helpers.classifier {
        let mut judge = ClassifierJudge::new(chat_model(name, helpers)?);
        if let Some(path) = &helpers.classifier_form {
            judge = judge.with_form(fs::read_to_string(path).with_context(|| path.display().to_string())?)?;
        }
        judges.push(Box::new(judge));
    }
    if let Some(name) = &helpers.scorer {
        judges.push(Box::new(ScoreJudge::new(chat_model(name, helpers)?, helpers.threshold)?));
    }
    Ok(judges)
}

/// The tasks whose files are named; requests and questions in the chat template and without.
pub fn tasks(files: &UtilityFiles, format: &ChatFormat) -> Result<Vec<Box<dyn UtilityTask>>> {
    let mut tasks: Vec<Box<dyn UtilityTask>> = Vec::new();
    let some = |count: usize| files.items.unwrap_or(count);
    let both = [("", true), (" without template", false)];
    for path in &files.arc {
        let items: Vec<(MultipleChoice, QuestionForm)> =
            load_arc(path)?.into_iter().map(|item| (item, QuestionForm::FullAnswers)).collect();
        let items = super::inputs::spread(items, some(usize::MAX));
        for (how, in_template) in both {
            let name = format!("{}{how}", stem(path));
            tasks.push(Box::new(ChoiceTask::new(name, items.clone(), in_template)));
        }
    }
    if let Some(folder) = &files.mmlu {
        let items = super::inputs::spread(mmlu(folder)?, some(usize::MAX));
        for (how, in_template) in both {
            tasks.push(Box::new(ChoiceTask::new(format!("mmlu{how}"), items.clone(), in_template)));
        }
    }
    let lists = [(&files.xstest, "xstest"), (&files.requests, "harmless requests")];
    for (path, name) in lists {
        let Some(path) = path else { continue };
        let requests = if name == "xstest" { load_xstest(path)? } else { load_harmless(path)? };
        let requests = super::inputs::spread(requests, some(usize::MAX));
        for (how, in_template) in both {
            tasks.push(Box::new(RequestTask::new(format!("{name}{how}"), requests.clone(), in_template)));
        }
    }
    if let Some(path) = &files.chats {
        let (chats, _) = encode_chats(format, ChatReader::open(path)?, 1024, Turns::All)?;
        tasks.push(Box::new(ChatTask::new("held-out chats", super::inputs::spread(chats, some(usize::MAX)))));
    }
    Ok(tasks)
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or(String::new(), |stem| stem.to_string_lossy().into_owned())
}

/// The test questions of every subject, each behind five solved ones.
fn mmlu(folder: &Path) -> Result<Vec<(MultipleChoice, QuestionForm)>> {
    let test = folder.join("test");
    let entries = fs::read_dir(&test).with_context(|| test.display().to_string())?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    let mut items = Vec::new();
    for path in paths {
        let name = stem(&path);
        let Some(subject) = name.strip_suffix("_test") else { continue };
        let mut examples = load_mmlu(folder.join("dev").join(format!("{subject}_dev.csv")))?;
        examples.truncate(5);
        let form = QuestionForm::Letters { subject: subject.replace('_', " "), examples };
        items.extend(load_mmlu(&path)?.into_iter().map(|item| (item, form.clone())));
    }
    if items.is_empty() {
        bail!("{}: holds no file whose name ends in _test.csv", test.display());
    }
    Ok(items)
}
