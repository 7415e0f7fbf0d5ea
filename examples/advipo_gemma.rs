//! Hardens a chat model with C-AdvIPO (Xhonneux et al., NeurIPS 2024).
//!
//! ```sh
//! cargo run --release --example advipo_gemma
//! cargo run --release --example advipo_gemma -- --model google/gemma-2b-it --behaviors behaviors.csv \
//!     --targets targets.json --refusals refusals.csv --out runs/gemma
//! ```
//!
//! Without arguments it builds a small Gemma that complies with every request for a recipe, forbids it potions, and shows
//! what that did. Ctrl-C stops after the current update; the same command goes on from there.

mod support;

use advtrain::{
    AdvIpoLoss, Algorithm, LoraConfig, LossConfig, ModelPreset, OptimizerConfig, Preset, RunConfig, TrainSettings,
};
use clap::Parser;
use support::{
    arguments::Arguments,
    job::{self, Plan},
};

fn main() {
    let real = RunConfig::preset(Algorithm::AdvIpo, Preset::Corrected, ModelPreset::Gemma2b);
    let mut toy = real.clone();
    toy.lora = LoraConfig { rank: 16, dropout: 0.0, ..LoraConfig::default() };
    // The toy is far surer of its answers than a chat model: nine nats per token lie between compliance and refusal, so the
    // margin that the loss asks for, 1/(2 beta), must be larger than the paper's two; and its square is then weighed down.
    toy.loss = LossConfig::AdvIpo(AdvIpoLoss { beta: 0.04, weight: 0.2, ..AdvIpoLoss::default() });
    toy.train = TrainSettings {
        epochs: 20,
        max_updates: Some(200),
        batch_size: 48,
        micro_batch_size: 24,
        utility_share: 0.5,
        optimizer: OptimizerConfig { learning_rate: 2e-3, max_gradient_norm: 1.0, ..OptimizerConfig::default() },
        ..TrainSettings::default()
    };
    job::main(Arguments::parse(), Plan { name: "advipo_gemma", toy, real });
}
