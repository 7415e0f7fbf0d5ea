//! The loss on what a model should go on saying.

use serde::{Deserialize, Serialize};

use super::{LossInput, Term, TermValues, UtilityLoss};
use crate::{ContinuationKind, Error, Result};

/// The loss of the useful continuations: the utility term of C-AdvUL, and alone plain supervised fine-tuning.
///
/// Whether a model refuses is decided by the first token of its answer, of which a mean over many tokens takes next to no
/// notice: with `first_weight` a second term is the loss of first tokens alone, against refusals of what is harmless.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `weight` | 1 | of the mean over all tokens | at least 0 |
/// | `first_weight` | 0 | of the mean over the first token of each answer; 0: there is no such term | at least 0 |
/// | `against` | `tokens` | what the loss of a token is | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisedLoss {
    /// The weight of the mean over all tokens.
    pub weight: f64,
    /// The weight of the mean over the first token of each answer.
    pub first_weight: f64,
    /// What the loss of a token is.
    pub against: Against,
}

/// What a model's prediction of a token is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// The token itself: cross-entropy (the paper's).
    #[default]
    Tokens,
    /// What the original model predicts there: KL(original || model), as latent adversarial training has it. Nothing is learnt
    /// from a row but to stay; one pass of the original model more.
    Reference,
}

impl Default for SupervisedLoss {
    fn default() -> Self {
        Self { weight: 1.0, first_weight: 0.0, against: Against::Tokens }
    }
}

impl UtilityLoss for SupervisedLoss {
    fn validate(&self) -> Result<()> {
        for (field, value) in [("utility.weight", self.weight), ("utility.first_weight", self.first_weight)] {
            Error::check_not_negative(field, value)?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn uses_reference(&self) -> bool {
        self.against == Against::Reference
    }

    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let targets = input.batch.targets(ContinuationKind::Utility)?;
        let states = input.predicting_hidden()?.predicting(&targets)?;
        let losses = match self.against {
            Against::Tokens => input.model.log_probs(&states, &targets.ids)?.f_neg()?,
            Against::Reference => {
                let reference = input.reference_predicting_hidden()?.predicting(&targets)?;
                input.model.kl(&states, &reference)?
            }
        };
        let term = |name: &str, weight, values, tokens| {
            let values = TermValues::Rows { values, kind: ContinuationKind::Utility, tokens };
            Term { name: name.into(), weight, values, cut_off: None }
        };
        let tokens = Some(targets.counts.shallow_clone());
        let mut terms = vec![term("utility", self.weight, targets.mean_per_row(&losses)?, tokens)];
        if self.first_weight > 0.0 {
            terms.push(term("utility_first", self.first_weight, targets.mean_of_firsts_per_row(&losses)?, None));
        }
        Ok(terms)
    }
}
