//! C-AdvUL: away from the harmful answer, toward the safe one.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{CutOff, CutOffForm, LossInput, RobustLoss, Term, TermValues};
use crate::{CausalLm, ContinuationKind, Error, Hidden, Result, Targets};

/// The robust terms of C-AdvUL (Xhonneux et al., NeurIPS 2024, equation 4):
///
/// ```text
/// loss = w_away * away + w_toward * toward     (+ w_utility * utility, a UtilityLoss)
/// away   = -CE(harmful | x + d)    cut off at -5
/// toward =  CE(safe    | x + d)    cut off at 0.5
/// ```
///
/// Both read one forward pass over the prompt with the same perturbation. A row's value is the mean over its target
/// tokens.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `away_weight` | 0.5 | | at least 0 |
/// | `toward_weight` | 0.5 | | at least 0 |
/// | `away` | `negative_cross_entropy` | form of the away term | |
/// | `away_cut_off` | -5, slope 0.001, continuous | | slope at least 0 |
/// | `toward_cut_off` | 0.5, slope 0.001, continuous | | slope at least 0 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvUlLoss {
    /// Weight of the away term.
    pub away_weight: f64,
    /// Weight of the toward term.
    pub toward_weight: f64,
    /// Form of the away term.
    pub away: AwayForm,
    /// Where the away term stops to count.
    pub away_cut_off: CutOff,
    /// Where the toward term stops to count.
    pub toward_cut_off: CutOff,
}

/// Form of the away term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AwayForm {
    /// log p: minus the cross-entropy (the paper's).
    NegativeCrossEntropy,
    /// -log(1 - p) of every token: unlikelihood, R2D2's. Never below 0, so the cut-off at -5 does not bind.
    Unlikelihood,
}

impl Default for AdvUlLoss {
    fn default() -> Self {
        let cut_off = |threshold| CutOff { threshold, slope: 0.001, form: CutOffForm::Continuous };
        Self {
            away_weight: 0.5,
            toward_weight: 0.5,
            away: AwayForm::NegativeCrossEntropy,
            away_cut_off: cut_off(-5.0),
            toward_cut_off: cut_off(0.5),
        }
    }
}

impl AdvUlLoss {
    /// The away term of each harmful target `[targets]`.
    fn away_values(&self, model: &dyn CausalLm, hidden: &Hidden, targets: &Targets) -> Result<Tensor> {
        let states = hidden.predicting(targets)?;
        match self.away {
            AwayForm::NegativeCrossEntropy => model.log_probs(&states, &targets.ids),
            AwayForm::Unlikelihood => Ok(model.log_complements(&states, &targets.ids)?.f_neg()?),
        }
    }
}

impl RobustLoss for AdvUlLoss {
    fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("loss.adv_ul.away_weight", self.away_weight),
            ("loss.adv_ul.toward_weight", self.toward_weight),
            ("loss.adv_ul.away_cut_off.slope", self.away_cut_off.slope),
            ("loss.adv_ul.toward_cut_off.slope", self.toward_cut_off.slope),
        ] {
            Error::check_not_negative(field, value)?;
        }
        for (field, cut_off) in [
            ("loss.adv_ul.away_cut_off.threshold", self.away_cut_off),
            ("loss.adv_ul.toward_cut_off.threshold", self.toward_cut_off),
        ] {
            if !cut_off.threshold.is_finite() {
                return Err(Error::setting(field, cut_off.threshold, "finite; a slope of 1 is no cut-off"));
            }
        }
        Ok(())
    }

    fn needs(&self) -> &[ContinuationKind] {
        &[ContinuationKind::Harmful, ContinuationKind::Safe]
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let hidden = input.predicting_hidden()?;
        let harmful_targets = input.batch.targets(ContinuationKind::Harmful)?;
        let away = self.away_values(input.model, &hidden, &harmful_targets)?;
        let (safe, safe_targets) = input.target_log_probs(&hidden, ContinuationKind::Safe)?;
        let away = TermValues::Rows {
            values: harmful_targets.mean_per_row(&away)?,
            kind: ContinuationKind::Harmful,
            tokens: Some(harmful_targets.counts),
        };
        let toward = TermValues::Rows {
            values: safe_targets.mean_per_row(&safe.f_neg()?)?,
            kind: ContinuationKind::Safe,
            tokens: Some(safe_targets.counts),
        };
        let term =
            |name: &str, weight, values, cut_off| Term { name: name.into(), weight, values, cut_off: Some(cut_off) };
        Ok(vec![
            term("away", self.away_weight, away, self.away_cut_off),
            term("toward", self.toward_weight, toward, self.toward_cut_off),
        ])
    }
}
