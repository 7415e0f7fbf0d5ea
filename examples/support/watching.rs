//! The progress bar of an evaluation.

use std::{
    io::{IsTerminal, stderr},
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
};

use advtrain::EvaluationProgress;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows where an evaluation stands, and stops it once a flag is raised. Where there is no terminal, it logs
/// what is begun.
pub struct Bar<'a> {
    bar: ProgressBar,
    model: String,
    shown: (String, usize),
    stop: &'a AtomicBool,
}

impl<'a> Bar<'a> {
    pub fn new(model: &str, stop: &'a AtomicBool) -> anyhow::Result<Self> {
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
        Ok(Self { bar, model: model.to_string(), shown: (String::new(), usize::MAX), stop })
    }

    pub fn see(&mut self, at: EvaluationProgress) -> ControlFlow<()> {
        let (step, steps) = at.step;
        self.bar.set_length(at.of as u64);
        self.bar.set_position(at.done as u64);
        self.bar.set_message(format!("{}: {}, step {step} of {steps}", self.model, at.doing));
        let now = (at.doing.to_string(), at.done);
        if now != self.shown && !stderr().is_terminal() {
            eprintln!("{}: {}, {} of {}", self.model, at.doing, at.done, at.of);
        }
        self.shown = now;
        if self.stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
