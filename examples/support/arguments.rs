//! The command line of the training examples.

use std::path::PathBuf;

use clap::Parser;

/// Hardens a chat model. Without arguments: a toy that is built first and takes a few minutes.
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// A Hugging Face model folder
    #[arg(long, requires = "behaviors")]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub given: GivenFiles,
    /// A run's TOML file, in place of the example's own settings
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Stop after so many updates
    #[arg(long)]
    pub updates: Option<usize>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Where the run goes; a run that was stopped there goes on
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Write the model with the adapter merged in too
    #[arg(long)]
    pub merged: bool,
    /// Rows to measure on, of each set
    #[arg(long, default_value_t = 50)]
    pub measured: usize,
    /// A run of seconds that only shows that everything works
    #[arg(long)]
    pub quick: bool,
}

/// Data files as they are published.
#[derive(Clone, Debug, clap::Args)]
pub struct GivenFiles {
    /// CSV with the columns Behavior and BehaviorID (HarmBench)
    #[arg(long, requires = "targets", requires = "model")]
    behaviors: Option<PathBuf>,
    /// JSON from behaviour id to a list of targets (HarmBench)
    #[arg(long)]
    targets: Option<PathBuf>,
    /// CSV with the columns Behavior and Safe_Response (HarmBench)
    #[arg(long)]
    refusals: Option<PathBuf>,
    /// JSONL of chats to stay useful on (UltraChat's form)
    #[arg(long)]
    utility: Option<PathBuf>,
    /// Behaviours to measure on; without, a tenth of the training behaviours is held out
    #[arg(long, requires = "validation_targets")]
    validation_behaviors: Option<PathBuf>,
    /// Their targets
    #[arg(long)]
    validation_targets: Option<PathBuf>,
    /// JSONL of harmless chats to measure on; without, a tenth of the utility chats is held out
    #[arg(long)]
    harmless: Option<PathBuf>,
}

/// The files of a run.
#[derive(Clone, Debug)]
pub struct Files {
    pub behaviors: PathBuf,
    pub targets: PathBuf,
    pub refusals: Option<PathBuf>,
    pub utility: Option<PathBuf>,
    pub validation_behaviors: Option<PathBuf>,
    pub validation_targets: Option<PathBuf>,
    pub harmless: Option<PathBuf>,
}

impl GivenFiles {
    /// The files, if behaviours and targets were named.
    pub fn files(self) -> Option<Files> {
        Some(Files {
            behaviors: self.behaviors?,
            targets: self.targets?,
            refusals: self.refusals,
            utility: self.utility,
            validation_behaviors: self.validation_behaviors,
            validation_targets: self.validation_targets,
            harmless: self.harmless,
        })
    }
}
