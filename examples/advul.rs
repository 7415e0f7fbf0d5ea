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

use advtrain::{Algorithm, ModelPreset, Preset, RunConfig};
use clap::Parser;
use support::{
    arguments::Arguments,
    job::{self, Plan},
    toy,
};

fn main() {
    let preset = RunConfig::preset(Algorithm::AdvUl, Preset::Corrected, ModelPreset::Gemma2b);
    let toy = toy::settings(preset, 150);
    job::main(Arguments::parse(), Plan { name: "advul", algorithm: Algorithm::AdvUl, toy });
}
