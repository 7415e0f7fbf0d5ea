//! Settings of a training run.

use serde::{Deserialize, Serialize};

use super::{optimizer::OptimizerConfig, schedule::Schedule};
use crate::{Error, Reduction, Result};

/// How a run is trained. The defaults are the paper's for C-AdvIPO, reduced per row.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `seed` | 0 | every random choice of the run comes from it | |
/// | `epochs` | 20 | passes over the robust rows (over the utility rows where there are no others) | at least 1 |
/// | `max_updates` | none | stop earlier; the schedule ends here too | at least 1 |
/// | `batch_size` | 64 | rows of an update | at least 1 |
/// | `micro_batch_size` | 8 | rows that are computed together | at least 1 |
/// | `utility_share` | 0 | share of an update's rows that are utility rows | 0 to 1 |
/// | `grouping` | `by_length` | how rows come together in micro-batches | |
/// | `reduction` | `per_row` | how rows become one number | |
/// | `dropout` | true | the adapter's dropout while training | |
/// | `checkpoint_every` | 20 | updates between checkpoints; 0: at the end and when stopped | |
/// | `keep_checkpoints` | 2 | the newest that stay | at least 1 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSettings {
    /// Every random choice of the run comes from it.
    pub seed: u64,
    /// Passes over the robust rows, or over the utility rows where there are no others.
    pub epochs: usize,
    /// Stop after so many updates; the schedule ends here too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_updates: Option<usize>,
    /// Rows of an update.
    pub batch_size: usize,
    /// Rows that are computed together: what memory allows. With [`Reduction::PerRow`], without dropout and without warm
    /// starts the result does not depend on it but for rounding, which an attack that follows signs makes larger.
    pub micro_batch_size: usize,
    /// Share of an update's rows that are utility rows.
    pub utility_share: f64,
    /// How rows come together in micro-batches.
    pub grouping: Grouping,
    /// How rows become one number.
    pub reduction: Reduction,
    /// Whether the adapter's dropout is on while training.
    pub dropout: bool,
    /// Updates between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: usize,
    /// How many of the newest checkpoints stay.
    pub keep_checkpoints: usize,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// The learning rate over the run.
    pub schedule: Schedule,
}

/// How rows come together in micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grouping {
    /// Robust and utility rows apart, each sorted by length: less is computed.
    #[default]
    ByLength,
    /// As they are drawn, mixed (the published implementation's).
    AsDrawn,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            seed: 0,
            epochs: 20,
            max_updates: None,
            batch_size: 64,
            micro_batch_size: 8,
            utility_share: 0.0,
            grouping: Grouping::ByLength,
            reduction: Reduction::PerRow,
            dropout: true,
            checkpoint_every: 20,
            keep_checkpoints: 2,
            optimizer: OptimizerConfig::default(),
            schedule: Schedule::default(),
        }
    }
}

impl TrainSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("train.epochs", self.epochs),
            ("train.max_updates", self.max_updates.unwrap_or(1)),
            ("train.batch_size", self.batch_size),
            ("train.micro_batch_size", self.micro_batch_size),
            ("train.keep_checkpoints", self.keep_checkpoints),
        ] {
            Error::check_count(field, value)?;
        }
        Error::check_share("train.utility_share", self.utility_share)?;
        // More cannot be written as TOML, which is how a run is kept.
        if i64::try_from(self.seed).is_err() {
            return Err(Error::setting("train.seed", self.seed, format!("at most {}", i64::MAX)));
        }
        self.optimizer.validate()?;
        self.schedule.validate()
    }
}
