//! How AutoDAN searches.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How AutoDAN searches. The defaults are HarmBench's.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `steps` | 100 | generations | at least 1 |
/// | `population` | 64 | texts of a generation | at least 2 |
/// | `elites` | 0.1 | share of them that stay as they are; if not 0, at least one does | 0 to below 1 |
/// | `crossover` | 0.5 | probability that two parents change sentences | 0 to 1 |
/// | `points` | 5 | at so many borders between sentences | at least 1 |
/// | `mutation` | 0.01 | probability that a child is rephrased | 0 to 1 |
/// | `synonym` | 0.2 | where no model rephrases: probability that a word of it gives way to a synonym | 0 to 1 |
/// | `words_between` | 0 | generations of words between two of sentences ([`crate::AutoDan`]); 4 in the original, 0: none | |
/// | `check_every` | 5 | so often the model is asked with the best text so far, and at the end | at least 1 |
/// | `stop_when_not_refused` | true | stop once a checked answer does not refuse | |
/// | `patience` | 10 | stop after so many generations without a better text; 0: never | |
/// | `prefixes` | shipped | a file of the texts to begin at, with empty lines between texts | at least one text |
/// | `seed` | 0 | decides every draw, with the case's id | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoDanSettings {
    /// Generations.
    pub steps: usize,
    /// Texts of a generation.
    pub population: usize,
    /// Share of them that stay.
    pub elites: f64,
    /// Probability that two parents change sentences.
    pub crossover: f64,
    /// Borders at which they do.
    pub points: usize,
    /// Probability that a child is rephrased.
    pub mutation: f64,
    /// Probability that a word of a rephrased child gives way to a synonym, where no model rephrases.
    pub synonym: f64,
    /// Generations of words between two of sentences.
    pub words_between: usize,
    /// So often the model is asked.
    pub check_every: usize,
    /// Whether to stop once a checked answer does not refuse.
    pub stop_when_not_refused: bool,
    /// Stop after so many generations without a better text.
    pub patience: usize,
    /// A file of the texts to begin at, read when the attack is made; without, those that are shipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefixes: Option<PathBuf>,
    /// Decides every draw.
    pub seed: u64,
}

impl Default for AutoDanSettings {
    fn default() -> Self {
        Self {
            steps: 100,
            population: 64,
            elites: 0.1,
            crossover: 0.5,
            points: 5,
            mutation: 0.01,
            synonym: 0.2,
            words_between: 0,
            check_every: 5,
            stop_when_not_refused: true,
            patience: 10,
            prefixes: None,
            seed: 0,
        }
    }
}

impl AutoDanSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let least = [("steps", self.steps, 1), ("population", self.population, 2), ("points", self.points, 1)];
        let least = least.into_iter().chain([("check_every", self.check_every, 1)]);
        for (name, value, least) in least {
            if value < least {
                return Err(Error::setting(format!("autodan.{name}"), value, format!("at least {least}")));
            }
        }
        let shares = [("crossover", self.crossover), ("mutation", self.mutation), ("synonym", self.synonym)];
        if let Some((name, value)) = shares.into_iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
            return Err(Error::setting(format!("autodan.{name}"), value, "from 0 to 1"));
        }
        if !(0.0..1.0).contains(&self.elites) {
            return Err(Error::setting("autodan.elites", self.elites, "from 0 to below 1"));
        }
        Ok(())
    }

    /// How many texts of a generation stay.
    pub(super) fn elites_of(&self, population: usize) -> usize {
        if self.elites > 0.0 { ((self.elites * population as f64) as usize).max(1) } else { 0 }
    }

    /// Whether a search gives up after so many generations without a better text.
    pub(super) fn is_tired(&self, since_better: usize) -> bool {
        self.patience > 0 && since_better >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_elites_stay_unless_none_are_wanted() {
        let elites = |elites, population| AutoDanSettings { elites, ..Default::default() }.elites_of(population);
        assert_eq!([elites(0.1, 64), elites(0.1, 3), elites(0.0, 64), elites(0.99, 3)], [6, 1, 0, 2]);
    }
}
