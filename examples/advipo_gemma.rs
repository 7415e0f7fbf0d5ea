//! Hardens a chat model with C-AdvIPO (Xhonneux et al., NeurIPS 2024).
//!
//! ```sh
//! cargo run --release --example advipo_gemma
//! cargo run --release --example advipo_gemma -- --model path/to/gemma-2b-it --behaviors behaviors.csv \
//!     --targets targets.json --refusals refusals.csv --out runs/gemma
//! ```
//!
//! Without arguments it builds a small Gemma that complies with every request for a recipe, forbids it potions, and shows
//! what that did. Ctrl-C stops after the current update, with exit code 130; the same command goes on from there.

mod support;

use advtrain::Algorithm;
use clap::Parser;
use support::{
    arguments::Arguments,
    job::{self, Plan},
    toy,
};

fn main() {
    job::main(
        Arguments::parse(),
        Plan { name: "advipo_gemma", algorithm: Algorithm::AdvIpo, toy: toy::advipo_settings },
    );
}
