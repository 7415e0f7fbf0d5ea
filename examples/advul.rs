//! Hardens a chat model with C-AdvUL (Xhonneux et al., NeurIPS 2024): away from harmful answers, toward refusals, and useful
//! on harmless chats.
//!
//! ```sh
//! cargo run --release --example advul
//! cargo run --release --example advul -- --model HuggingFaceH4/zephyr-7b-beta --behaviors behaviors.csv \
//!     --targets targets.json --refusals refusals.csv --utility ultrachat.jsonl --out runs/zephyr
//! ```
//!
//! Without arguments it works on the toy of the example `advipo_gemma`.

mod support;

use advtrain::{Algorithm, LoraConfig, ModelPreset, OptimizerConfig, Preset, RunConfig, TrainSettings};
use clap::Parser;
use support::{
    arguments::Arguments,
    job::{self, Plan},
};

fn main() {
    let real = RunConfig::preset(Algorithm::AdvUl, Preset::Corrected, ModelPreset::Gemma2b);
    let mut toy = real.clone();
    toy.lora = LoraConfig { rank: 16, dropout: 0.0, ..LoraConfig::default() };
    toy.train = TrainSettings {
        epochs: 20,
        max_updates: Some(150),
        batch_size: 48,
        micro_batch_size: 24,
        utility_share: 0.5,
        optimizer: OptimizerConfig { learning_rate: 2e-3, max_gradient_norm: 1.0, ..OptimizerConfig::default() },
        ..TrainSettings::default()
    };
    job::main(Arguments::parse(), Plan { name: "advul", toy, real });
}
