//! The command line of the training examples.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use advtrain::{Algorithm, Dtype, ModelPreset, Preset, Radius, RunConfig, ThreatModel};
use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

/// Hardens a chat model. Without arguments: a toy that is built first and takes a few minutes.
///
/// Exit codes: 0 done, 1 an error, 130 stopped by Ctrl-C; the same command then goes on from the last checkpoint.
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// A Hugging Face model folder
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// A folder with an adapter (PEFT) to train on, in place of a fresh one. Reference values stay those of the model without
    #[arg(long, requires = "model")]
    pub adapter: Option<PathBuf>,
    #[command(flatten)]
    pub files: GivenFiles,
    /// A run's TOML file, in place of a preset
    #[arg(long, conflicts_with_all = ["preset", "family"])]
    pub config: Option<PathBuf>,
    /// Whose choices: the authors' implementation's, what this crate holds to be right (the default), the same with a
    /// cheaper attack, or those for small models on a CPU. The toy takes attack, data and utility term of them alone
    #[arg(long, value_enum)]
    pub preset: Option<PresetName>,
    /// The paper's model that gives epsilon; without, one of the folder's model type
    #[arg(long, value_enum, requires = "model")]
    pub family: Option<FamilyName>,
    /// Epsilon, as a share of the mean norm of the embeddings, in place of the preset's
    #[arg(long)]
    pub epsilon: Option<f64>,
    /// Epsilon of the attack that measures, in place of the run's own: for runs of several epsilons that are compared
    #[arg(long)]
    pub measured_epsilon: Option<f64>,
    /// Length of the run in updates; the learning rate's schedule is as long
    #[arg(long)]
    pub updates: Option<usize>,
    /// Rows of an update, in place of the preset's
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Rows that go through the model at once, in place of the preset's: more is faster on a GPU and takes its memory
    #[arg(long)]
    pub micro_batch_size: Option<usize>,
    /// The share of an update's rows that are utility rows, in place of the preset's
    #[arg(long)]
    pub utility_share: Option<f64>,
    /// Decides every random number of the run, in place of the preset's
    #[arg(long)]
    pub seed: Option<u64>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, float32 or bfloat16, in place of the preset's
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Where the run goes; a run that was stopped there goes on
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Write the model with the adapter merged in too
    #[arg(long)]
    pub merged: bool,
    /// Rows to measure on, of each set
    #[arg(long, default_value_t = 50)]
    pub measured: usize,
    /// Measure every so many updates too, in short, and write that into curve.jsonl
    #[arg(long)]
    pub curve: Option<NonZeroUsize>,
    /// A run of seconds that only shows that everything works
    #[arg(long)]
    pub quick: bool,
    /// Print the run's configuration as TOML and end; without --model the toy's
    #[arg(long)]
    pub print_config: bool,
}

/// Data files as they are published.
#[derive(Clone, Debug, clap::Args)]
pub struct GivenFiles {
    /// CSV with the columns Behavior and BehaviorID (HarmBench)
    #[arg(long, requires_all = ["targets", "model"], conflicts_with = "preferences")]
    pub behaviors: Option<PathBuf>,
    /// JSON from behaviour id to a list of targets (HarmBench)
    #[arg(long, requires = "behaviors")]
    pub targets: Option<PathBuf>,
    /// CSV with the columns Behavior and Safe_Response (HarmBench)
    #[arg(long, requires = "behaviors")]
    pub refusals: Option<PathBuf>,
    /// JSONL of prompts with a chosen and a rejected answer (TRL), in place of behaviours
    #[arg(long, requires = "model")]
    pub preferences: Option<PathBuf>,
    /// JSONL of chats to stay useful on (UltraChat's form)
    #[arg(long, requires = "model")]
    pub utility: Option<PathBuf>,
    /// The share of training behaviours, and of utility chats, that is held out to measure on where no file of them is named
    #[arg(long, default_value_t = 0.1)]
    pub held_out: f64,
    /// Behaviours to measure on; without, some of the training behaviours are held out
    #[arg(long, requires_all = ["validation_targets", "model"])]
    pub validation_behaviors: Option<PathBuf>,
    /// Their targets
    #[arg(long, requires = "validation_behaviors")]
    pub validation_targets: Option<PathBuf>,
    /// Measure on behaviours of this FunctionalCategory alone (HarmBench: standard, contextual)
    #[arg(long, requires = "behaviors")]
    pub category: Option<String>,
    /// JSONL of harmless chats to measure on; without, some of the utility chats are held out
    #[arg(long, requires = "model")]
    pub harmless: Option<PathBuf>,
    /// Text with a harmless request on each line, to count refusals on
    #[arg(long, requires = "model")]
    pub harmless_requests: Option<PathBuf>,
}

/// [`Preset`] as a word.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PresetName {
    Published,
    Corrected,
    Fast,
    Small,
}

/// [`ModelPreset`] as a word.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FamilyName {
    #[value(name = "gemma-2b")]
    Gemma2b,
    #[value(name = "phi3-mini")]
    Phi3Mini,
    #[value(name = "mistral-7b")]
    Mistral7b,
    #[value(name = "zephyr-7b")]
    Zephyr7b,
    #[value(name = "llama2-7b")]
    Llama2_7b,
}

impl From<PresetName> for Preset {
    fn from(name: PresetName) -> Self {
        match name {
            PresetName::Published => Self::Published,
            PresetName::Corrected => Self::Corrected,
            PresetName::Fast => Self::Fast,
            PresetName::Small => Self::Small,
        }
    }
}

impl From<FamilyName> for ModelPreset {
    fn from(name: FamilyName) -> Self {
        match name {
            FamilyName::Gemma2b => Self::Gemma2b,
            FamilyName::Phi3Mini => Self::Phi3Mini,
            FamilyName::Mistral7b => Self::Mistral7b,
            FamilyName::Zephyr7b => Self::Zephyr7b,
            FamilyName::Llama2_7b => Self::Llama2_7b,
        }
    }
}

impl Arguments {
    /// The run that the arguments ask for: a file's, or the toy's, or a preset's; with what single options change.
    pub fn config(&self, algorithm: Algorithm, toy: fn(Preset) -> RunConfig) -> Result<RunConfig> {
        let preset = self.preset.map_or(Preset::Corrected, Preset::from);
        let mut config = match (&self.config, &self.model) {
            (Some(path), _) => RunConfig::read(path)?,
            (None, None) => toy(preset),
            (None, Some(folder)) => RunConfig::preset(algorithm, preset, self.model_preset(folder)?),
        };
        match (self.epsilon, &mut config.attack) {
            (Some(share), Some(attack)) => attack.threat.radius = Radius::Relative(share),
            (Some(share), None) => bail!(
                "--epsilon {share}: the configuration has no attack to train with; --measured-epsilon is that of the one that measures"
            ),
            (None, _) => {}
        }
        if self.quick {
            config.train.max_updates = Some(3);
            config.train.batch_size = config.train.batch_size.min(8);
        }
        config.model.dtype = self.dtype.unwrap_or(config.model.dtype);
        config.train.batch_size = self.batch_size.unwrap_or(config.train.batch_size);
        config.train.micro_batch_size = self.micro_batch_size.unwrap_or(config.train.micro_batch_size);
        config.train.utility_share = self.utility_share.unwrap_or(config.train.utility_share);
        config.train.seed = self.seed.unwrap_or(config.train.seed);
        config.train.max_updates = self.updates.or(config.train.max_updates);
        config.validate()?;
        if let Some(share) = self.measured_epsilon {
            let threat = ThreatModel { radius: Radius::Relative(share), ..ThreatModel::default() };
            threat.validate().context("--measured-epsilon")?;
        }
        Ok(config)
    }

    fn model_preset(&self, folder: &Path) -> Result<ModelPreset> {
        match self.family {
            Some(name) => Ok(name.into()),
            None => Ok(ModelPreset::of_family(advtrain::DecoderConfig::read(folder)?.family)),
        }
    }
}
