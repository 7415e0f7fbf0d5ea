//! What is measured on the way.

use std::{num::NonZeroUsize, path::Path, sync::Arc};

use advtrain::{CausalLm, ChatFormat, Error, JsonLines, Observer, Result, UpdateMetrics};
use serde::{Deserialize, Serialize};

use super::{
    evaluation::{Measured, Measuring},
    inputs::HeldOut,
    job::STOP,
};

/// Measures the model every so many updates, and adds a line of JSON to a file.
pub struct Curve {
    every: NonZeroUsize,
    points: JsonLines<Point>,
    /// What a measurement depends on.
    of: String,
    /// The last update of which the file had a line when it was opened.
    last: Option<usize>,
    measuring: Measuring,
    format: Arc<ChatFormat>,
    held_out: Arc<HeldOut>,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Point {
    update: usize,
    of: String,
    measured: Measured,
}

impl Curve {
    /// Goes on with a file behind its lines up to the update `done`, of which those that are `of` something else are dropped.
    pub fn open(
        path: &Path,
        every: NonZeroUsize,
        done: usize,
        of: String,
        measuring: Measuring,
        format: Arc<ChatFormat>,
        held_out: Arc<HeldOut>,
    ) -> anyhow::Result<Self> {
        let points = JsonLines::open(path, |point: &Point| point.update <= done && point.of == of)?;
        let last = JsonLines::<Point>::read(path)?.last().map(|point| point.update);
        Ok(Self { every, points, of, last, measuring, format, held_out })
    }

    /// The point of an update that is there without it: its measuring was stopped.
    pub fn catch_up(&mut self, update: usize, of: usize, model: &dyn CausalLm) -> anyhow::Result<()> {
        let is_there = self.last == Some(update);
        if self.is_due(update, of) && !is_there { self.measure(update, model) } else { Ok(()) }
    }

    /// The beginning and the end are measured in full, elsewhere.
    fn is_due(&self, update: usize, of: usize) -> bool {
        0 < update && update < of && update.is_multiple_of(self.every.get())
    }

    fn measure(&mut self, update: usize, model: &dyn CausalLm) -> anyhow::Result<()> {
        let frozen = model.frozen(false)?;
        let model = frozen.as_deref().unwrap_or(model);
        let Some(measured) = self.measuring.measure(model, &self.format, &self.held_out, &STOP)? else { return Ok(()) };
        Ok(self.points.add(&Point { update, of: self.of.clone(), measured })?)
    }
}

impl Observer for Curve {
    fn update(&mut self, _: &UpdateMetrics) -> Result<()> {
        Ok(())
    }

    fn inspect(&mut self, metrics: &UpdateMetrics, model: &dyn CausalLm) -> Result<()> {
        let UpdateMetrics { update, updates_total, .. } = *metrics;
        if !self.is_due(update, updates_total) {
            return Ok(());
        }
        let wrong = |error| Error::mismatch(format!("measuring after update {update}"), "a measurement", error);
        self.measure(update, model).map_err(wrong)
    }
}
