//! HarmBench's files: behaviours, the targets of their attacks, and safe responses.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};

use super::{AnswerPair, LoadReport, Message, table::Table};
use crate::{Error, Result, files};

/// The safe answer of a behaviour for which no file says another.
pub const DEFAULT_SAFE_RESPONSE: &str = "Sorry, I can't do that.";

/// One row of a behaviours CSV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behavior {
    /// Column `BehaviorID`.
    pub id: String,
    /// Column `Behavior`: what is asked for.
    pub behavior: String,
    /// Column `ContextString`: a text that the request is about.
    pub context: Option<String>,
    /// Column `FunctionalCategory` (`standard`, `contextual`, `copyright`).
    pub functional_category: Option<String>,
    /// Column `SemanticCategory`, or `Category`.
    pub category: Option<String>,
    /// Column `Tags`, split at commas.
    pub tags: Vec<String>,
    /// The line of the file, from 1.
    pub line: u64,
}

impl Behavior {
    /// The user's message as HarmBench builds it: the context, if there is one, then a rule, then the behaviour.
    pub fn request(&self) -> String {
        match &self.context {
            Some(context) => format!("{context}\n\n---\n\n{}", self.behavior),
            None => self.behavior.clone(),
        }
    }

    /// Whether harm is decided by comparing hashes (copyrighted text), so that a refusal judge does not apply.
    pub fn is_hash_check(&self) -> bool {
        self.tags.iter().any(|tag| tag == "hash_check")
    }
}

/// The files of one set of behaviours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BehaviorFiles {
    /// CSV with the columns `Behavior` and `BehaviorID`.
    pub behaviors: PathBuf,
    /// JSON object from behaviour id to a list of targets.
    pub targets: PathBuf,
    /// CSV with the columns `Behavior` and `Safe_Response`; without it every safe answer is [`DEFAULT_SAFE_RESPONSE`].
    #[serde(default)]
    pub safe_responses: Option<PathBuf>,
}

/// Reads a behaviours CSV.
///
/// # Errors
/// If the file cannot be read, lacks a column, holds no row, an empty behaviour or id, or the same id twice.
pub fn load_behaviors(path: impl AsRef<Path>) -> Result<Vec<Behavior>> {
    let path = path.as_ref();
    let table = Table::read(path, &["Behavior", "BehaviorID"])?;
    let mut lines: HashMap<&str, u64> = HashMap::new();
    let mut behaviors = Vec::new();
    for row in table.rows() {
        let line = row.line;
        let needed = |column: &str| {
            row.filled(column)
                .ok_or_else(|| Error::file(path, format!("line {line}: {column} is empty and must not be")))
        };
        let (id, behavior) = (needed("BehaviorID")?, needed("Behavior")?);
        if let Some(first) = lines.insert(id, line) {
            let message = format!("lines {first} and {line} have the same BehaviorID {id}; ids must be unique");
            return Err(Error::file(path, message));
        }
        behaviors.push(Behavior {
            id: id.to_string(),
            behavior: behavior.to_string(),
            context: row.filled("ContextString").map(str::to_string),
            functional_category: row.filled("FunctionalCategory").map(str::to_string),
            category: row.filled("SemanticCategory").or(row.filled("Category")).map(str::to_string),
            tags: row
                .text("Tags")
                .split(',')
                .map(str::trim)
                .filter(|tag| !tag.is_empty())
                .map(str::to_string)
                .collect(),
            line,
        });
    }
    if behaviors.is_empty() {
        return Err(Error::file(path, "holds no behaviour; at least one row is needed"));
    }
    Ok(behaviors)
}

/// Reads a targets JSON: behaviour ids with their targets, in the order of the file. Empty targets are kept, so that a
/// target's place in its list is stable.
///
/// # Errors
/// If the file cannot be read, is not an object from ids to texts or lists of texts, or has the same id twice.
pub fn load_targets(path: impl AsRef<Path>) -> Result<Vec<(String, Vec<String>)>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let mut deserializer = serde_json::Deserializer::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text));
    let wrong = |error: &dyn fmt::Display| {
        let message = format!("{error}; expected an object from behaviour ids to lists of texts, each id once");
        Error::file(path, message)
    };
    let targets: TargetMap = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| wrong(&error))?;
    deserializer.end().map_err(|error| wrong(&error))?;
    Ok(targets.0)
}

/// Reads what to train on: one row per target that is not empty, with the id `BehaviorID/place in the list`.
///
/// Behaviours without targets, targets without a behaviour and the like are counted in the report and warned about.
///
/// # Errors
/// If a file cannot be read or has the wrong form, or no row is left.
pub fn load_behavior_pairs(files: &BehaviorFiles) -> Result<(Vec<AnswerPair>, LoadReport)> {
    let behaviors = load_behaviors(&files.behaviors)?;
    let targets = load_targets(&files.targets)?;
    let safe = files.safe_responses.as_deref().map(safe_responses).transpose()?;
    let mut report = LoadReport::default();
    let mut pairs = Vec::new();
    let mut by_id: HashMap<&str, &[String]> = targets.iter().map(|(id, list)| (id.as_str(), list.as_slice())).collect();
    for behavior in &behaviors {
        let Some(targets) = by_id.remove(behavior.id.as_str()) else {
            report.add("behavior_without_targets", "behaviours without targets left out", &behavior.id);
            continue;
        };
        let safe = safe_response(behavior, safe.as_ref(), &mut report);
        for (index, target) in targets.iter().enumerate() {
            let id = format!("{}/{index}", behavior.id);
            if target.trim().is_empty() {
                report.add("empty_target", "empty targets skipped", id);
                continue;
            }
            if behavior.is_hash_check() {
                report.add("hash_check", "rows kept that are tagged hash_check (copyright)", &id);
            }
            pairs.push(AnswerPair {
                id,
                group: behavior.id.clone(),
                place: format!("{} line {}", files.behaviors.display(), behavior.line),
                messages: vec![Message::user(behavior.request())],
                harmful: target.clone(),
                harmful_ends: false,
                safe: safe.clone(),
                hash_check: behavior.is_hash_check(),
                functional_category: behavior.functional_category.clone(),
            });
        }
    }
    for (id, _) in targets.iter().filter(|(id, _)| by_id.contains_key(id.as_str())) {
        report.add("targets_without_behavior", "ids in the targets file without a behaviour left out", id);
    }
    report.rows = pairs.len();
    report.warn(&files.behaviors.display().to_string());
    if pairs.is_empty() {
        let message = format!("no row is left with the targets of {}: {report}", files.targets.display());
        return Err(Error::file(&files.behaviors, message));
    }
    Ok((pairs, report))
}

fn safe_response(behavior: &Behavior, safe: Option<&HashMap<String, String>>, report: &mut LoadReport) -> String {
    let Some(safe) = safe else { return DEFAULT_SAFE_RESPONSE.to_string() };
    safe.get(&behavior.behavior).cloned().unwrap_or_else(|| {
        report.add("default_safe_response", "behaviours without a safe response given the default one", &behavior.id);
        DEFAULT_SAFE_RESPONSE.to_string()
    })
}

/// Safe responses by the behaviour's text.
fn safe_responses(path: &Path) -> Result<HashMap<String, String>> {
    let table = Table::read(path, &["Behavior", "Safe_Response"])?;
    let mut lines = HashMap::new();
    let mut responses = HashMap::new();
    for row in table.rows() {
        let line = row.line;
        let behavior = row.text("Behavior");
        let response = row
            .filled("Safe_Response")
            .ok_or_else(|| Error::file(path, format!("line {line}: Safe_Response is empty and must not be")))?;
        if let Some(first) = lines.insert(behavior.to_string(), line) {
            let message = format!("lines {first} and {line} have the same Behavior; each may have one safe response");
            return Err(Error::file(path, message));
        }
        responses.insert(behavior.to_string(), response.to_string());
    }
    Ok(responses)
}

/// A JSON object in its own order, which refuses a repeated key.
struct TargetMap(Vec<(String, Vec<String>)>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum Targets {
    One(String),
    Several(Vec<String>),
}

impl<'de> Deserialize<'de> for TargetMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = TargetMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from behaviour ids to targets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TargetMap, A::Error> {
                let mut entries = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((id, targets)) = map.next_entry::<String, Targets>()? {
                    if !seen.insert(id.clone()) {
                        return Err(serde::de::Error::custom(format!("the id {id} occurs twice")));
                    }
                    let list = match targets {
                        Targets::One(target) => vec![target],
                        Targets::Several(list) => list,
                    };
                    entries.push((id, list));
                }
                Ok(TargetMap(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
#[path = "behaviors_tests.rs"]
mod tests;
