//! The learning rate over a run.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate goes over a run.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `warm_up` | 0.03 | share of the updates in which it rises linearly from 0 | 0 to below 1 |
/// | `shape` | `cosine` | how it falls afterwards | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Share of the updates in which the rate rises linearly from 0.
    pub warm_up: f64,
    /// How the rate falls afterwards.
    pub shape: ScheduleShape,
}

/// How a learning rate falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleShape {
    /// Half a cosine, to 0 (the paper's).
    #[default]
    Cosine,
    /// Linearly to 0.
    Linear,
    /// Not at all.
    Constant,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { warm_up: 0.03, shape: ScheduleShape::Cosine }
    }
}

impl Schedule {
    /// Checks every field.
    ///
    /// # Errors
    /// If the warm-up is not a share.
    pub fn validate(&self) -> Result<()> {
        Error::check_below_one("train.schedule.warm_up", self.warm_up)
    }

    /// What the learning rate is multiplied by at an update (from 0) of `total`, as transformers' schedules do.
    pub fn factor(&self, update: usize, total: usize) -> f64 {
        let warm_up = (self.warm_up * total as f64).ceil();
        let update = update as f64;
        if update < warm_up {
            return update / warm_up.max(1.0);
        }
        let done = ((update - warm_up) / (total as f64 - warm_up).max(1.0)).min(1.0);
        match self.shape {
            ScheduleShape::Cosine => 0.5 * (1.0 + (PI * done).cos()),
            ScheduleShape::Linear => 1.0 - done,
            ScheduleShape::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    /// As transformers' TrainingArguments make steps of a share: 0.03 of 40 updates is 1.2, so two updates.
    #[test]
    fn a_part_of_an_update_of_warm_up_is_a_whole_one() {
        let schedule = Schedule::default();
        assert_eq!([0, 1, 2].map(|update| schedule.factor(update, 40)), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn shapes_fall_as_they_say() {
        let at = |shape, update| Schedule { warm_up: 0.2, shape }.factor(update, 10);
        assert_eq!(at(ScheduleShape::Linear, 6), 0.5);
        assert_eq!(at(ScheduleShape::Constant, 9), 1.0);
        assert_relative_eq!(at(ScheduleShape::Cosine, 6), 0.5, epsilon = 1e-12);
        assert_eq!(at(ScheduleShape::Linear, 1), 0.5);
        assert!([ScheduleShape::Linear, ScheduleShape::Cosine].iter().all(|shape| at(*shape, 10) == 0.0));
    }

    #[test]
    fn a_warm_up_that_is_no_share_is_refused() {
        for warm_up in [-0.1, 1.0, f64::NAN] {
            assert!(Schedule { warm_up, ..Default::default() }.validate().is_err());
        }
    }
}
