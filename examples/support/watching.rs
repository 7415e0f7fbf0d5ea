//! The progress bar of an evaluation.

use std::{
    io::{IsTerminal, stderr},
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use advtrain::EvaluationProgress;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows where an evaluation stands, and stops it once a flag is raised. Where there is no terminal, it logs
/// what is begun, and how far it is at times.
pub struct Bar<'a> {
    bar: ProgressBar,
    model: String,
    logged: Option<(String, Instant)>,
    stop: &'a AtomicBool,
}

const BETWEEN_LOGS: Duration = Duration::from_secs(10);

impl<'a> Bar<'a> {
    pub fn new(model: &str, stop: &'a AtomicBool) -> anyhow::Result<Self> {
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
        Ok(Self { bar, model: model.to_string(), logged: None, stop })
    }

    pub fn see(&mut self, at: EvaluationProgress) -> ControlFlow<()> {
        let (step, steps) = at.step;
        self.bar.set_length(at.of as u64);
        self.bar.set_position(at.done as u64);
        self.bar.set_message(format!("{}: {}, step {step} of {steps}", self.model, at.doing));
        let known =
            self.logged.as_ref().is_some_and(|(doing, at_time)| doing == at.doing && at_time.elapsed() < BETWEEN_LOGS);
        if !known && !stderr().is_terminal() {
            eprintln!("{}: {}, {} of {}", self.model, at.doing, at.done, at.of);
            self.logged = Some((at.doing.to_string(), Instant::now()));
        }
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
