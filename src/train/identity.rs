//! What tells one run from another.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{data::TrainingData, settings::TrainSettings};
use crate::{
    Error, Example, Result,
    version::{LIBTORCH, VERSION},
};

/// Everything that a run's result depends on, each thing by its name: kept in checkpoints, so that a run goes on only as what
/// it was.
pub(super) type Identity = BTreeMap<String, String>;

/// Settings that may change while a run is stopped: they decide how often it is saved, and through the number of updates,
/// which has an entry of its own, how long it is.
const FREE: [&str; 4] = ["checkpoint_every", "keep_checkpoints", "epochs", "max_updates"];

/// The entries for settings and rows.
pub(super) fn of_run(settings: &TrainSettings, data: &TrainingData, updates: usize) -> Result<Identity> {
    let value = serde_json::to_value(settings)
        .map_err(|error| Error::mismatch("settings as JSON", "values that JSON has", error))?;
    let mut identity = Identity::new();
    if let Value::Object(fields) = value {
        for (name, value) in fields.into_iter().filter(|(name, _)| !FREE.contains(&name.as_str())) {
            flatten(format!("train.{name}"), value, &mut identity);
        }
    }
    identity.insert("number of updates".into(), updates.to_string());
    identity.insert("robust rows".into(), Example::digest(&data.robust));
    identity.insert("utility rows".into(), Example::digest(&data.utility));
    identity.insert("version".into(), VERSION.into());
    identity.insert("libtorch".into(), LIBTORCH.into());
    Ok(identity)
}

fn flatten(name: String, value: Value, into: &mut Identity) {
    match value {
        Value::Object(fields) => {
            fields.into_iter().for_each(|(field, value)| flatten(format!("{name}.{field}"), value, into));
        }
        value => {
            into.insert(name, value.to_string());
        }
    }
}

/// The first thing in which two runs differ: its name, and what it was and is.
pub(super) fn difference<'a>(was: &'a Identity, is: &'a Identity) -> Option<(&'a str, &'a str, &'a str)> {
    let of = |identity: &'a Identity, name: &str| identity.get(name).map_or("nothing", String::as_str);
    let names = was.keys().chain(is.keys());
    names.map(|name| (name.as_str(), of(was, name), of(is, name))).find(|(_, was, is)| was != is)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_differs_is_named_and_one_of_saving_is_free() {
        let identity = |settings: &TrainSettings| of_run(settings, &TrainingData::default(), 7).unwrap();
        let base = TrainSettings::default();
        let saved_more_often = TrainSettings { checkpoint_every: 1, keep_checkpoints: 9, ..base.clone() };
        assert_eq!(difference(&identity(&base), &identity(&saved_more_often)), None);
        let mut other = base.clone();
        other.optimizer.learning_rate = 0.5;
        let (was, is) = (identity(&base), identity(&other));
        assert_eq!(difference(&was, &is), Some(("train.optimizer.learning_rate", "0.0002", "0.5")));
    }
}
