//! The rows of a run, and the numbers computed for them before it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::Path,
};

use sha2::{Digest, Sha256};
use tch::Device;

use crate::{
    Batch, CausalLm, ContinuationKind, Error, ErrorKind, Example, Result, RobustLoss, Source, digest::hex,
    error::Context, files,
};

/// The rows that a run trains on.
#[derive(Clone, Debug, Default)]
pub struct TrainingData {
    /// Rows with a harmful and, for the losses that want one, a safe continuation.
    pub robust: Vec<Example>,
    /// Rows with a useful continuation.
    pub utility: Vec<Example>,
}

impl TrainingData {
    pub(super) fn get(&self, (source, index): (Source, usize)) -> &Example {
        match source {
            Source::Robust => &self.robust[index],
            Source::Utility => &self.utility[index],
        }
    }

    /// An error if two rows have the same id: starts are drawn and reference values kept by it.
    pub(super) fn check_ids(&self) -> Result<()> {
        let mut seen = HashSet::new();
        match self.robust.iter().chain(&self.utility).find(|example| !seen.insert(example.id())) {
            Some(twice) => Err(Error::example(twice.id(), "another row has the same id; ids must be unique")),
            None => Ok(()),
        }
    }
}

/// What a row has one precomputed number for.
#[derive(Clone, Copy, Debug)]
enum Counting {
    Row,
    Token,
    Target(ContinuationKind),
}

impl Counting {
    const ALL: [Self; 4] =
        [Self::Row, Self::Token, Self::Target(ContinuationKind::Harmful), Self::Target(ContinuationKind::Safe)];

    /// How many numbers that is; none if the row has no such continuation.
    fn of(self, row: &Example) -> Option<usize> {
        match self {
            Self::Row => Some(1),
            Self::Token => Some(row.len()),
            Self::Target(kind) => row.continuation(kind).map(|continuation| continuation.tokens.targets()),
        }
    }

    fn expected(self, row: &Example) -> String {
        let count = self.of(row).map_or("none".to_string(), |count| count.to_string());
        match self {
            Self::Row => format!("{count} for the row"),
            Self::Token => format!("{count} for its tokens"),
            Self::Target(kind) => format!("{count} for its {kind:?} targets"),
        }
    }
}

/// Numbers of the original model, by example id and name.
#[derive(Debug, Default)]
pub(super) struct Reference {
    values: BTreeMap<String, BTreeMap<String, Vec<f64>>>,
}

impl Reference {
    /// Computes what a loss asks for, or reads it from `folder` where the same was computed before. `fingerprint` is the
    /// original model's, with the dtype that it computes in.
    pub(super) fn prepare(
        loss: &dyn RobustLoss,
        model: &dyn CausalLm,
        fingerprint: &str,
        rows: &[Example],
        micro_batch_size: usize,
        folder: Option<&Path>,
    ) -> Result<Self> {
        if loss.precomputes().is_empty() {
            return Ok(Self::default());
        }
        let key = key(loss, fingerprint, rows);
        let path = folder.map(|folder| folder.join(format!("reference-{}.json", &key[..16])));
        if let Some(path) = path.as_deref().filter(|path| path.exists()) {
            let reference = Self { values: files::read_json(path)? };
            reference.check(loss, rows).context(|| format!("reading {}", path.display()))?;
            return Ok(reference);
        }
        tracing::info!(rows = rows.len(), "computing what the loss asks of the original model");
        let reference = Self::compute(loss, model, rows, micro_batch_size)?;
        reference.check(loss, rows)?;
        if let Some(path) = path {
            files::write_json(&path, &reference.values)?;
        }
        Ok(reference)
    }

    /// Every row must have the numbers that the loss says it computes, and no others.
    fn check(&self, loss: &dyn RobustLoss, rows: &[Example]) -> Result<()> {
        let wanted: BTreeSet<&str> = loss.precomputes().iter().copied().collect();
        for row in rows {
            let found: BTreeSet<&str> =
                self.values.get(row.id()).into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            if found != wanted {
                let what = format!("precomputed numbers of example {}", row.id());
                return Err(Error::mismatch(what, format!("{wanted:?}"), format!("{found:?}")));
            }
        }
        wanted.into_iter().try_for_each(|name| self.check_numbers(name, rows))
    }

    /// Those of one name: finite ones, and counted in the same way for every row.
    fn check_numbers(&self, name: &str, rows: &[Example]) -> Result<()> {
        let mut counts = Counting::ALL.to_vec();
        for row in rows {
            let numbers = self.values.get(row.id()).and_then(|of_row| of_row.get(name)).map_or(&[][..], Vec::as_slice);
            let what = || format!("precomputed {name} of example {}", row.id());
            if let Some(value) = numbers.iter().find(|number| !number.is_finite()) {
                return Err(ErrorKind::NotFinite { what: what(), value: *value }.into());
            }
            let before = counts.clone();
            counts.retain(|counting| counting.of(row) == Some(numbers.len()));
            if counts.is_empty() {
                let expected: Vec<String> = before.iter().map(|counting| counting.expected(row)).collect();
                return Err(Error::mismatch(what(), expected.join(" or "), numbers.len()));
            }
        }
        Ok(())
    }

    fn compute(loss: &dyn RobustLoss, model: &dyn CausalLm, rows: &[Example], size: usize) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let mut reference = Self::default();
        let mut sorted: Vec<&Example> = rows.iter().collect();
        sorted.sort_by_key(|example| example.len());
        for rows in sorted.chunks(size) {
            let batch = Batch::new(rows.iter().map(|example| (*example).clone()).collect(), model.device())?;
            for (name, values) in loss.precompute(model, &batch)? {
                if values.len() != rows.len() {
                    return Err(Error::mismatch(
                        format!("precomputed {name:?}"),
                        format!("{} rows", rows.len()),
                        values.len(),
                    ));
                }
                for (example, values) in rows.iter().zip(values) {
                    reference.values.entry(example.id().to_string()).or_default().insert(name.clone(), values);
                }
            }
        }
        Ok(reference)
    }

    /// A batch of these rows with the numbers that belong to each.
    pub(super) fn batch(&self, rows: Vec<Example>, names: &[&str], device: Device) -> Result<Batch> {
        let mut values = Vec::new();
        for name in names {
            let of_rows = rows.iter().map(|example| {
                let of_example = self.values.get(example.id()).and_then(|values| values.get(*name));
                // Utility rows have none.
                of_example.cloned().unwrap_or_default()
            });
            values.push((*name, of_rows.collect::<Vec<_>>()));
        }
        values.into_iter().try_fold(Batch::new(rows, device)?, |batch, (name, values)| batch.with_values(name, values))
    }
}

/// What the numbers depend on: the loss and its settings, the model, the rows.
fn key(loss: &dyn RobustLoss, model: &str, rows: &[Example]) -> String {
    let mut hash = Sha256::new();
    for part in [loss.describe().as_str(), model, Example::digest(rows).as_str()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}
