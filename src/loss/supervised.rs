//! Plain supervised loss.

use serde::{Deserialize, Serialize};

use super::{LossInput, Term, TermValues, UtilityLoss};
use crate::{ContinuationKind, Error, Result};

/// Mean cross-entropy of the useful continuations: the utility term of C-AdvUL, and alone plain supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisedLoss {
    /// The term's weight. Default 1.
    pub weight: f64,
}

impl Default for SupervisedLoss {
    fn default() -> Self {
        Self { weight: 1.0 }
    }
}

impl UtilityLoss for SupervisedLoss {
    fn validate(&self) -> Result<()> {
        if !(self.weight >= 0.0 && self.weight.is_finite()) {
            return Err(Error::setting("utility.weight", self.weight, "at least 0 and finite"));
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let hidden = input.predicting_hidden()?;
        let (log_probs, targets) = input.target_log_probs(&hidden, ContinuationKind::Utility)?;
        let values = targets.mean_per_row(&log_probs.f_neg()?)?;
        let values = TermValues::Rows { values, kind: ContinuationKind::Utility, tokens: Some(targets.counts) };
        Ok(vec![Term { name: "utility".into(), weight: self.weight, values, cut_off: None }])
    }
}
