//! How candidates are drawn and judged.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a token search goes on from step to step: GCG of Zou et al. 2023, "Universal and Transferable Adversarial Attacks on
/// Aligned Language Models", section 2.2.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `width` | 512 | candidates of a step | at least 1 |
/// | `top_k` | 256 | of each position so many tokens are tried | at least 1 |
/// | `replaced` | 1 | positions that a candidate changes | at least 1 |
/// | `positions` | `drawn` | how they are chosen | `drawn`, `spread` |
/// | `loss` | `cross_entropy` | what is driven down | |
/// | `buffer` | 0 | the best strings that are kept, and gone on from the best; 0: always from the newest | |
/// | `rows` | 128 | candidates of one forward pass; halved where memory runs out | at least 1 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenSearchSettings {
    /// Candidates of a step.
    pub width: usize,
    /// Of each position so many tokens, those along which the loss falls most steeply, are tried.
    pub top_k: usize,
    /// Positions that a candidate changes.
    pub replaced: usize,
    /// How those positions are chosen.
    pub positions: Positions,
    /// What is driven down.
    pub loss: SearchLoss,
    /// How many of the best strings are kept: a step goes on from the best, and its own replaces the worst if it is better. With 0 it
    /// goes on from the newest string, better or not.
    pub buffer: usize,
    /// Candidates of one forward pass.
    pub rows: usize,
}

/// How the positions that a candidate changes are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// At random, as nanoGCG does.
    #[default]
    Drawn,
    /// Evenly: candidate j of w changes position floor(j n / w) of n first, as HarmBench does; any further ones are drawn.
    Spread,
}

/// What a token search drives down, of the cross-entropies of the target's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SearchLoss {
    /// Their mean.
    #[default]
    CrossEntropy,
    /// ln(mean(exp(sharpness x))) / sharpness, between their mean (0) and the largest of them (infinity): Asadi and Littman 2017.
    Mellowmax {
        /// Above 0.
        sharpness: f64,
    },
}

impl SearchLoss {
    /// Of cross-entropies that were computed elsewhere, one for each token of the target; of none it is infinite.
    pub fn of(self, losses: &[f64]) -> f64 {
        let mean = |of: &dyn Fn(f64) -> f64| losses.iter().map(|loss| of(*loss)).sum::<f64>() / losses.len() as f64;
        let Some(most) = losses.iter().copied().reduce(f64::max) else { return f64::INFINITY };
        match self {
            Self::CrossEntropy => mean(&|loss| loss),
            Self::Mellowmax { sharpness } => most + mean(&|loss| (sharpness * (loss - most)).exp()).ln() / sharpness,
        }
    }
}

impl Default for TokenSearchSettings {
    fn default() -> Self {
        Self {
            width: 512,
            top_k: 256,
            replaced: 1,
            positions: Positions::Drawn,
            loss: SearchLoss::CrossEntropy,
            buffer: 0,
            rows: 128,
        }
    }
}

impl TokenSearchSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let counts = [("width", self.width), ("top_k", self.top_k), ("replaced", self.replaced), ("rows", self.rows)];
        for (name, count) in counts {
            Error::check_count(&format!("search.{name}"), count)?;
        }
        match self.loss {
            SearchLoss::Mellowmax { sharpness } => Error::check_positive("search.loss.mellowmax.sharpness", sharpness),
            _ => Ok(()),
        }
    }
}
