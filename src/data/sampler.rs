//! Which rows make up which update: seeded, and a function of the update's number alone, so that a run resumes exactly.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    digest::{generator, share_of},
};

/// Which set of rows an index counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Rows with a harmful and a safe answer.
    Robust,
    /// Harmless conversations.
    Utility,
}

/// What a [`Sampler`] mixes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerSettings {
    /// Rows of the robust loss.
    pub robust_rows: usize,
    /// Rows of the utility set.
    pub utility_rows: usize,
    /// Rows of an update.
    pub batch_size: usize,
    /// Share of an update's rows that are utility rows, from 0 to 1; kept to a billionth. A share that does not give whole
    /// rows is met in the long run: some updates have one row more of a kind.
    pub utility_share: f64,
    /// Another seed gives another order.
    pub seed: u64,
}

/// Mixes two sets of rows into updates.
///
/// One set defines the epochs: the robust one, or the utility one if all rows come from there. An epoch has as many
/// updates as that set fills, at least one; in each, it goes through a fresh permutation, and what does not fill an update
/// is left out of that epoch. With a fractional share an epoch of E updates takes `floor` or `ceil` of E times the mean
/// number of rows, which is never more than the set has. A set smaller than its part of one update repeats rows in it.
///
/// The other set runs on from permutation to permutation without regard to epochs.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: SamplerSettings,
    /// Utility rows of [`BILLION`] updates.
    utility_rate: u128,
    updates_per_epoch: u64,
}

const BILLION: u128 = 1_000_000_000;

impl Sampler {
    /// Checks the settings.
    ///
    /// # Errors
    /// If the batch size is 0, the share is not between 0 and 1, or a set that rows must come from is empty.
    pub fn new(settings: SamplerSettings) -> Result<Self> {
        let SamplerSettings { robust_rows, utility_rows, batch_size, utility_share, .. } = settings;
        Error::check_count("batch_size", batch_size)?;
        Error::check_share("utility_share", utility_share)?;
        let share = (utility_share * BILLION as f64).round() as u128;
        if share > 0 && utility_rows == 0 {
            return Err(Error::setting("utility_share", utility_share, "0 where there are no utility rows"));
        }
        if share < BILLION && robust_rows == 0 {
            return Err(Error::setting("utility_share", utility_share, "1 where there are no robust rows"));
        }
        let utility_rate = batch_size as u128 * share;
        let (rows, rate) = match share == BILLION {
            true => (utility_rows, utility_rate),
            false => (robust_rows, batch_size as u128 * BILLION - utility_rate),
        };
        let updates_per_epoch = (rows as u128 * BILLION / rate).max(1) as u64;
        Ok(Self { settings, utility_rate, updates_per_epoch })
    }

    /// The settings.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// Updates in an epoch.
    pub fn updates_per_epoch(&self) -> u64 {
        self.updates_per_epoch
    }

    /// The epoch of an update; both count from 0.
    pub fn epoch_of(&self, update: u64) -> u64 {
        update / self.updates_per_epoch
    }

    /// How often a set was gone through when an update begins, from 0: the epoch for the set that defines epochs.
    pub fn pass_of(&self, source: Source, update: u64) -> u64 {
        let total = match source {
            Source::Robust => self.settings.robust_rows,
            Source::Utility => self.settings.utility_rows,
        };
        if self.defines_epochs(source) {
            return self.epoch_of(update);
        }
        self.rows_before(source, update) / (total as u64).max(1)
    }

    /// The rows of an update, which counts from 0, in a random order: where each comes from and its index there.
    pub fn batch(&self, update: u64) -> Vec<(Source, usize)> {
        let mut rows = self.rows_of(Source::Robust, update);
        rows.extend(self.rows_of(Source::Utility, update));
        shuffle(&mut rows, &mut generator(self.settings.seed, "order in a batch", update.to_le_bytes()));
        rows
    }

    fn rows_of(&self, source: Source, update: u64) -> Vec<(Source, usize)> {
        let (start, end) = (self.rows_before(source, update), self.rows_before(source, update.saturating_add(1)));
        if start == end {
            return Vec::new();
        }
        let (total, name) = match source {
            Source::Robust => (self.settings.robust_rows, "primary rows"),
            Source::Utility => (self.settings.utility_rows, "utility rows"),
        };
        let total = total as u64;
        let first_update = self.epoch_of(update) * self.updates_per_epoch;
        let epoch_start = self.rows_before(source, first_update);
        let epoch_rows = self.rows_before(source, first_update.saturating_add(self.updates_per_epoch)) - epoch_start;
        // Rows of a set that defines the epochs are counted from the epoch's start; otherwise from the run's start, through
        // one permutation after the other.
        if self.defines_epochs(source) && epoch_rows <= total {
            let order = self.permutation(total, name, self.epoch_of(update));
            return (start - epoch_start..end - epoch_start).map(|row| (source, order[row as usize])).collect();
        }
        let mut rows = Vec::new();
        for pass in start / total..=(end - 1) / total {
            let order = self.permutation(total, name, pass);
            let here = start.max(pass * total)..end.min((pass + 1) * total);
            rows.extend(here.map(|row| (source, order[(row % total) as usize])));
        }
        rows
    }

    fn defines_epochs(&self, source: Source) -> bool {
        let all_utility = self.utility_rate == self.settings.batch_size as u128 * BILLION;
        all_utility == (source == Source::Utility)
    }

    /// How many rows of a set all updates before this one take.
    fn rows_before(&self, source: Source, update: u64) -> u64 {
        let utility = u128::from(update) * self.utility_rate / BILLION;
        let rows = match source {
            Source::Utility => utility,
            Source::Robust => u128::from(update) * self.settings.batch_size as u128 - utility,
        };
        rows as u64
    }

    fn permutation(&self, rows: u64, name: &str, counter: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..rows as usize).collect();
        shuffle(&mut order, &mut generator(self.settings.seed, name, counter.to_le_bytes()));
        order
    }
}

/// Shuffles in place. Written out, because a library's own way may change from version to version and a run must resume.
fn shuffle<T>(items: &mut [T], generator: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let wide = u128::from(generator.next_u64()) * (last as u128 + 1);
        items.swap(last, (wide >> 64) as usize);
    }
}

/// Whether the rows of this name are held out of training. It depends on the name, the share and the seed alone, so that a
/// file larger than the memory can be split while it is read; and a name that is held out for one share is so for a larger
/// one.
///
/// # Errors
/// If the share is not between 0 and 1.
pub fn is_held_out(name: &str, validation_share: f64, seed: u64) -> Result<bool> {
    Error::check_share("validation_share", validation_share)?;
    Ok(share_of(seed, "held out", name) < validation_share)
}

/// Splits rows into training and validation by a name of theirs, and returns the indices of each. [`is_held_out`] decides,
/// so rows of one group (a behaviour's targets) stay together whatever other rows there are.
///
/// # Errors
/// As [`is_held_out`].
pub fn split_by_name<N: AsRef<str>>(
    names: impl IntoIterator<Item = N>,
    validation_share: f64,
    seed: u64,
) -> Result<(Vec<usize>, Vec<usize>)> {
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (index, name) in names.into_iter().enumerate() {
        let side = if is_held_out(name.as_ref(), validation_share, seed)? { &mut validation } else { &mut training };
        side.push(index);
    }
    Ok((training, validation))
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
