//! What is measured on the way.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
};

use advtrain::{CausalLm, ChatFormat, Error, Observer, Result, UpdateMetrics};
use serde::{Deserialize, Serialize};

use super::{
    evaluation::{Measured, Measuring},
    inputs::HeldOut,
    job::STOP,
};

/// Measures the model every so many updates, and adds a line of JSON to a file.
pub struct Curve {
    every: NonZeroUsize,
    path: PathBuf,
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
    measured: Measured,
}

impl Curve {
    /// Goes on with a file behind its lines up to the update `done`.
    pub fn open(
        path: PathBuf,
        every: NonZeroUsize,
        done: usize,
        measuring: Measuring,
        format: Arc<ChatFormat>,
        held_out: Arc<HeldOut>,
    ) -> anyhow::Result<Self> {
        let text = if path.exists() { fs::read_to_string(&path)? } else { String::new() };
        // A last line may have been cut off; its update is made again.
        let points = text.lines().filter_map(|line| serde_json::from_str::<Point>(line).ok());
        let kept: Vec<Point> = points.filter(|point| point.update <= done).collect();
        let lines = kept.iter().map(|point| Ok(serde_json::to_string(point)? + "\n"));
        fs::write(&path, lines.collect::<anyhow::Result<String>>()?)?;
        let last = kept.last().map(|point| point.update);
        Ok(Self { every, path, last, measuring, format, held_out })
    }

    /// The point of an update that is there without it: its measuring was stopped.
    pub fn catch_up(&mut self, update: usize, model: &dyn CausalLm) -> anyhow::Result<()> {
        let is_there = self.last == Some(update);
        if update > 0 && update.is_multiple_of(self.every.get()) && !is_there {
            self.measure(update, model)
        } else {
            Ok(())
        }
    }

    fn measure(&mut self, update: usize, model: &dyn CausalLm) -> anyhow::Result<()> {
        let frozen = model.frozen(false)?;
        let model = frozen.as_deref().unwrap_or(model);
        let Some(measured) = self.measuring.measure(model, &self.format, &self.held_out, &STOP)? else { return Ok(()) };
        let mut file = OpenOptions::new().append(true).open(&self.path)?;
        Ok(file.write_all((serde_json::to_string(&Point { update, measured })? + "\n").as_bytes())?)
    }
}

impl Observer for Curve {
    fn update(&mut self, _: &UpdateMetrics) -> Result<()> {
        Ok(())
    }

    fn inspect(&mut self, metrics: &UpdateMetrics, model: &dyn CausalLm) -> Result<()> {
        let UpdateMetrics { update, updates_total, .. } = *metrics;
        // The end is measured in full.
        if !update.is_multiple_of(self.every.get()) || update == updates_total {
            return Ok(());
        }
        let wrong = |error| Error::mismatch(format!("measuring after update {update}"), "a measurement", error);
        self.measure(update, model).map_err(wrong)
    }
}
