//! How GCG searches, and when it stops.

use serde::{Deserialize, Serialize};

use crate::{Error, Positions, Result, TokenSearchSettings};

/// How GCG looks for a suffix.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `steps` | 250 | gradient steps | at least 1 |
/// | `start` | `" x"`, 20 times | what the search begins at; it follows the behaviour | at least one token |
/// | `search` | [`TokenSearchSettings`] | how candidates are drawn and judged | |
/// | `ascii_only` | true | tokens of other letters are not used | |
/// | `check_every` | 50 | so often the model is asked with the best string so far, and at the end | at least 1 |
/// | `stop` | `never` | before all steps are done | |
/// | `seed` | 0 | decides every candidate, with the case's id | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcgSettings {
    /// Gradient steps.
    pub steps: usize,
    /// What the search begins at.
    pub start: String,
    /// How candidates are drawn and judged.
    pub search: TokenSearchSettings,
    /// Whether tokens of other letters are left out.
    pub ascii_only: bool,
    /// So often the model is asked.
    pub check_every: usize,
    /// When to stop early.
    pub stop: GcgStop,
    /// Decides every candidate.
    pub seed: u64,
}

/// When GCG stops before all its steps are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GcgStop {
    /// Never.
    #[default]
    Never,
    /// Once the model's likeliest tokens are the target (nanoGCG's `early_stop`).
    SaysTarget,
    /// Once the model is asked at a loss of at most this and does not refuse (HarmBench).
    NotRefused {
        /// In nats per token.
        loss: f64,
    },
}

impl Default for GcgSettings {
    fn default() -> Self {
        Self::nanogcg()
    }
}

impl GcgSettings {
    /// The defaults of nanoGCG 0.3.0. It puts the string right behind the behaviour; here a space is between them, as in HarmBench.
    pub fn nanogcg() -> Self {
        Self {
            steps: 250,
            start: " x".repeat(20),
            search: TokenSearchSettings::default(),
            ascii_only: true,
            check_every: 50,
            stop: GcgStop::Never,
            seed: 0,
        }
    }

    /// HarmBench's settings.
    pub fn harmbench() -> Self {
        Self {
            steps: 500,
            start: " !".repeat(20),
            search: TokenSearchSettings { positions: Positions::Spread, ..TokenSearchSettings::default() },
            stop: GcgStop::NotRefused { loss: 0.05 },
            ..Self::nanogcg()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("steps", self.steps), ("check_every", self.check_every)] {
            Error::check_count(&format!("gcg.{name}"), value)?;
        }
        if let GcgStop::NotRefused { loss } = self.stop
            && (loss < 0.0 || loss.is_nan())
        {
            return Err(Error::setting("gcg.stop.not_refused.loss", loss, "at least 0"));
        }
        if self.start.trim().is_empty() {
            return Err(Error::setting("gcg.start", format!("{:?}", self.start), "a text of at least one token"));
        }
        self.search.validate()
    }
}
