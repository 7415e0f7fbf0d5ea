//! Who is evaluated, how it answers, and what the evaluation was started with.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::Device;

use crate::{
    ChatFormat, Date, Dtype, Error, Generation, Message, Result, Subject, TrainableLm,
    digest::bytes_digest,
    files,
    version::{LIBTORCH, VERSION},
};

/// The file of an evaluation's folder that holds its [`Setup`].
pub(super) const SETUP: &str = "setup.json";

/// Who is evaluated, and how it answers: an evaluation goes on only with the same. What is marked as free may differ
/// when it goes on, and is then what it was last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// The model's name in reports.
    pub model: String,
    /// What tells its weights from others: [`TrainableLm::fingerprint`], and of an adapter the digests of its files.
    pub weights: String,
    /// The adapter's folder; free, as its files are in `weights`.
    pub adapter: Option<PathBuf>,
    /// [`crate::ChatTemplate::hash`] of the chat template.
    pub template: String,
    /// A digest of a conversation of one turn as text and tokens: it differs where template, special tokens or tokenizer do.
    pub rendered: String,
    /// The date that the template prints, if it prints one.
    pub date: Option<Date>,
    /// What the model computes in.
    pub dtype: Dtype,
    /// How answers are made.
    pub generation: Generation,
    /// This crate's version.
    pub version: String,
    /// The version of the libtorch that the crate was built with.
    pub libtorch: String,
    /// Where the model computes: `cpu`, `cuda:0`. Free.
    pub device: String,
    /// Texts that are computed together. Free.
    pub rows: usize,
    /// What the evaluation was started with. Free: cases, settings and items are compared one by one.
    pub inputs: EvaluationInputs,
}

/// Fields in which an evaluation may differ from itself when it goes on.
const FREE: [&str; 4] = ["adapter", "device", "rows", "inputs"];

/// What an evaluation was started with, as far as its caller tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationInputs {
    /// Where the attacks' settings come from: the name of a preset, or a file.
    pub settings: String,
    /// The files that were read.
    pub files: Vec<InputFile>,
    /// The category to which the cases were limited.
    pub category: Option<String>,
    /// How many cases there are.
    pub cases: usize,
    /// Behaviours that are not attacked, and why.
    pub left_out: BTreeMap<String, String>,
    /// What else was found while the files were read.
    pub notes: Vec<String>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// What it is.
    pub what: String,
    /// Where it is.
    pub path: PathBuf,
    /// A digest of its bytes; of a folder, of the files in it with their names.
    pub digest: String,
}

impl InputFile {
    /// A file, or a folder with all that is in it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(what: impl Into<String>, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        Ok(Self { what: what.into(), digest: path_digest(&path)?, path })
    }
}

fn path_digest(path: &Path) -> Result<String> {
    let at = |error| Error::io(path, error);
    if !path.is_dir() {
        return Ok(bytes_digest(&fs::read(path).map_err(at)?));
    }
    let mut digests = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(at)? {
        let entry = entry.map_err(at)?;
        digests.insert(entry.file_name().to_string_lossy().into_owned(), path_digest(&entry.path())?);
    }
    Ok(bytes_digest(json!(digests).to_string().as_bytes()))
}

impl Setup {
    /// Of a model that was loaded from files, its adapter's included.
    ///
    /// # Errors
    /// If the adapter's files cannot be read, the template takes no conversation, or libtorch fails.
    pub fn of_model(
        name: impl Into<String>,
        model: &impl TrainableLm,
        adapter: Option<&Path>,
        subject: &Subject,
    ) -> Result<Self> {
        let mut weights: String = model.fingerprint()?.chars().take(16).collect();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let Some(folder) = adapter else { break };
            weights = format!("{weights}+{}", path_digest(&folder.join(file))?);
        }
        Ok(Self { adapter: adapter.map(Path::to_path_buf), ..Self::new(name, weights, subject)? })
    }

    /// Of a subject.
    ///
    /// # Errors
    /// If the template takes no conversation.
    pub fn new(model: impl Into<String>, weights: impl Into<String>, subject: &Subject) -> Result<Self> {
        let (format, lm) = (subject.format(), subject.model());
        let template = format.template();
        Ok(Self {
            model: model.into(),
            weights: weights.into(),
            adapter: None,
            template: template.hash(),
            rendered: rendered(format)?,
            date: template.uses_clock().then(|| template.date()),
            dtype: Dtype::of(lm.kind()),
            generation: subject.generation().clone(),
            version: VERSION.into(),
            libtorch: LIBTORCH.into(),
            device: device_name(lm.device()),
            rows: subject.rows(),
            inputs: EvaluationInputs::default(),
        })
    }

    /// The same, started with these inputs.
    #[must_use]
    pub fn with_inputs(self, inputs: EvaluationInputs) -> Self {
        Self { inputs, ..self }
    }

    /// The setup of the evaluation in a folder, if there is one: for the date that its template printed.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn read(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = folder.as_ref().join(SETUP);
        path.exists().then(|| files::read_json(&path)).transpose()
    }

    /// The first fields that must not differ and do: their names, what they were and what they are.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        differences(&json!(self), &json!(other), &FREE)
    }
}

/// The fields of two objects that differ, `free` ones aside: each with what it was and what it is.
pub(super) fn differences(was: &Value, is: &Value, free: &[&str]) -> Vec<String> {
    let fields = is.as_object().into_iter().flatten().filter(|(name, _)| !free.contains(&name.as_str()));
    let differing = fields.filter(|(name, value)| was.get(name.as_str()) != Some(value));
    differing.map(|(name, value)| format!("{name} was {} and is {value}", was[name.as_str()])).collect()
}

/// All that a template puts around a turn, and how the tokenizer reads a prompt.
fn rendered(format: &ChatFormat) -> Result<String> {
    let request = [Message::user("Hello")];
    let answered = [Message::user("Hello"), Message::assistant("Hi")];
    let (template, ids) = (format.template(), format.prompt(&request)?);
    let texts = [template.render(&request, true)?, template.render(&answered, false)?];
    Ok(bytes_digest(json!([texts, ids.ids()]).to_string().as_bytes()))
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(number) => format!("cuda:{number}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_differs_by_the_names_and_contents_of_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let digest = || InputFile::read("x", folder.path()).unwrap().digest;
        fs::create_dir(folder.path().join("test")).unwrap();
        let file = folder.path().join("test/a.csv");
        fs::write(&file, "1").unwrap();
        let first = digest();
        assert_eq!(digest(), first);
        fs::write(&file, "2").unwrap();
        let second = digest();
        fs::rename(&file, folder.path().join("test/b.csv")).unwrap();
        assert!(first != second && second != digest());
        let message = InputFile::read("x", folder.path().join("c")).unwrap_err().to_string();
        assert!(message.contains("/c: "), "{message}");
    }
}
