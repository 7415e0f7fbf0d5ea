//! Hardens a chat model with C-AdvUL (Xhonneux et al., NeurIPS 2024): away from harmful answers, toward refusals, and useful
//! on harmless chats.
//!
//! ```sh
//! cargo run --release --example advul
//! cargo run --release --example advul -- --model path/to/zephyr-7b-beta --family zephyr-7b \
//!     --behaviors behaviors.csv --targets targets.json --refusals refusals.csv --utility ultrachat.jsonl --out runs/zephyr
//! ```
//!
//! Without arguments it works on the toy of the example `advipo_gemma`.

mod support;

use advtrain::{AdvUlLoss, Algorithm, LossConfig, ModelPreset, Preset, RunConfig};
use clap::Parser;
use support::{
    arguments::Arguments,
    job::{self, Plan},
    toy,
};

fn main() {
    job::main(Arguments::parse(), Plan { name: "advul", algorithm: Algorithm::AdvUl, toy });
}

fn toy(preset: Preset) -> RunConfig {
    let mut toy = toy::settings(RunConfig::preset(Algorithm::AdvUl, preset, ModelPreset::Gemma2b), 200);
    // The toy is far surer of its answers than a chat model: with the paper's 0.5 the term ends where the first token of every
    // answer is still "Sure", with which six of the refusal's seven tokens are learnt.
    toy.loss = LossConfig::AdvUl(AdvUlLoss { toward_weight: 3.0, ..AdvUlLoss::default() });
    toy
}
