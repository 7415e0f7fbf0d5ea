//! C-AdvIPO: prefer the safe answer to the harmful one.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{LossInput, Precomputed, RobustLoss, Term, TermValues, target_log_probs};
use crate::{Adapter, Batch, CausalLm, ContinuationKind, Error, Input, Last, Pass, Result, Targets, tensor};

const REFERENCE_SAFE: &str = "reference_safe";
const REFERENCE_HARMFUL: &str = "reference_harmful";

/// C-AdvIPO (Xhonneux et al., NeurIPS 2024, equation 5):
///
/// ```text
/// h    = [ lp(safe | x+d) - lp(harmful | x+d) ] - [ lp0(safe | x) - lp0(harmful | x) ]
/// loss = ( h - 1/(2 beta) )^2
/// ```
///
/// lp is the log-probability of the continuation averaged over its target tokens, lp0 that of the original model on the
/// prompt without perturbation, computed once before training. Other preference losses of h take IPO's place.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `form` | `ipo` | the function of h | |
/// | `beta` | 0.25 | IPO: the margin is 1/(2 beta) nats per token; others: the slope | above 0 |
/// | `length` | `mean` | log-probabilities per token, or of the whole continuation | |
/// | `harmful_floor` | -5, clamped | floor of lp of each harmful token; not of lp0 | at most 0; -inf: none |
/// | `weight` | 1 | the term's weight | at least 0 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvIpoLoss {
    /// The function of h.
    pub form: PreferenceForm,
    /// Of IPO the inverse of twice the margin, of the others the slope.
    pub beta: f64,
    /// Log-probabilities per token, or of the whole continuation.
    pub length: LengthNormalisation,
    /// Floor of the log-probability of each harmful token, so that a token is not driven away for ever.
    pub harmful_floor: Floor,
    /// The term's weight.
    pub weight: f64,
}

/// A preference loss as a function of h.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceForm {
    /// (h - 1/(2 beta))² (Azar et al. 2023).
    Ipo,
    /// -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) (DPO, Rafailov et al. 2023; s the label smoothing).
    Dpo {
        /// The share of labels taken to be wrong; 0 to below 0.5.
        label_smoothing: f64,
    },
    /// max(0, 1 - beta h) (SLiC, Zhao et al. 2023).
    Hinge,
    /// -log sigmoid(beta h' - margin), h' without the reference (SimPO, Meng et al. 2024).
    SimPo {
        /// In units of beta h'.
        margin: f64,
    },
}

/// Log-probabilities per token, or of the whole continuation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthNormalisation {
    /// Averaged over the continuation's target tokens (the paper's).
    Mean,
    /// Summed over them.
    Sum,
}

/// A floor of log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// In nats.
    pub value: f64,
    /// What a token below the floor counts as.
    pub form: FloorForm,
}

/// What a token below a floor counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FloorForm {
    /// As the floor.
    Clamp,
    /// As 0, as published: such a token then counts as certain.
    Zero,
}

impl Default for AdvIpoLoss {
    fn default() -> Self {
        Self {
            form: PreferenceForm::Ipo,
            beta: 0.25,
            length: LengthNormalisation::Mean,
            harmful_floor: Floor { value: -5.0, form: FloorForm::Clamp },
            weight: 1.0,
        }
    }
}

impl Floor {
    fn apply(&self, log_probs: &Tensor) -> Result<Tensor> {
        match self.form {
            FloorForm::Clamp => Ok(log_probs.f_clamp_min(self.value)?),
            FloorForm::Zero => Ok(log_probs.f_masked_fill(&log_probs.f_lt(self.value)?, 0.0)?),
        }
    }
}

impl AdvIpoLoss {
    fn has_reference(&self) -> bool {
        !matches!(self.form, PreferenceForm::SimPo { .. })
    }

    /// One log-probability per row `[rows]` from one per target.
    fn of_rows(&self, log_probs: &Tensor, targets: &Targets) -> Result<Tensor> {
        let mean = targets.mean_per_row(log_probs)?;
        match self.length {
            LengthNormalisation::Mean => Ok(mean),
            LengthNormalisation::Sum => Ok(mean.f_mul(&targets.counts_as(mean.kind())?)?),
        }
    }

    /// The loss of each row from h `[rows]`.
    fn of_margin(&self, h: &Tensor) -> Result<Tensor> {
        let scaled = h.f_mul_scalar(self.beta)?;
        Ok(match self.form {
            PreferenceForm::Ipo => h.f_sub_scalar(0.5 / self.beta)?.f_square()?,
            PreferenceForm::Dpo { label_smoothing } => {
                let right = scaled.f_log_sigmoid()?.f_mul_scalar(label_smoothing - 1.0)?;
                right.f_sub(&scaled.f_neg()?.f_log_sigmoid()?.f_mul_scalar(label_smoothing)?)?
            }
            PreferenceForm::Hinge => scaled.f_neg()?.f_add_scalar(1.0)?.f_relu()?,
            PreferenceForm::SimPo { margin } => scaled.f_sub_scalar(margin)?.f_log_sigmoid()?.f_neg()?,
        })
    }
}

impl RobustLoss for AdvIpoLoss {
    fn validate(&self) -> Result<()> {
        Error::check_positive("loss.adv_ipo.beta", self.beta)?;
        Error::check_not_negative("loss.adv_ipo.weight", self.weight)?;
        let floor = self.harmful_floor.value;
        if floor.is_nan() || floor > 0.0 {
            let allowed = "a log-probability: at most 0, or -inf for no floor";
            return Err(Error::setting("loss.adv_ipo.harmful_floor.value", floor, allowed));
        }
        match self.form {
            PreferenceForm::Dpo { label_smoothing } if !(0.0..0.5).contains(&label_smoothing) => {
                let field = "loss.adv_ipo.form.dpo.label_smoothing";
                Err(Error::setting(field, label_smoothing, "at least 0 and below 0.5"))
            }
            PreferenceForm::SimPo { margin } if !margin.is_finite() => {
                Err(Error::setting("loss.adv_ipo.form.sim_po.margin", margin, "finite"))
            }
            _ => Ok(()),
        }
    }

    fn needs(&self) -> &[ContinuationKind] {
        &[ContinuationKind::Harmful, ContinuationKind::Safe]
    }

    fn precomputes(&self) -> &[&str] {
        if self.has_reference() { &[REFERENCE_SAFE, REFERENCE_HARMFUL] } else { &[] }
    }

    fn precompute(&self, reference: &dyn CausalLm, batch: &Batch) -> Result<Precomputed> {
        let pass = Pass { adapter: Adapter::Off, last: Last::Predictors, ..Pass::default() };
        let hidden = reference.hidden(&Input::of_batch(reference, batch, None, pass)?)?;
        let of_kind = |kind| -> Result<Vec<Vec<f64>>> {
            let (log_probs, targets) = target_log_probs(reference, batch, &hidden, kind)?;
            Ok(tensor::numbers(&self.of_rows(&log_probs, &targets)?)?.into_iter().map(|value| vec![value]).collect())
        };
        Ok(vec![
            (REFERENCE_SAFE.into(), of_kind(ContinuationKind::Safe)?),
            (REFERENCE_HARMFUL.into(), of_kind(ContinuationKind::Harmful)?),
        ])
    }

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let hidden = input.predicting_hidden()?;
        let (safe, safe_targets) = input.target_log_probs(&hidden, ContinuationKind::Safe)?;
        let (harmful, harmful_targets) = input.target_log_probs(&hidden, ContinuationKind::Harmful)?;
        let safe = self.of_rows(&safe, &safe_targets)?;
        let harmful = self.of_rows(&self.harmful_floor.apply(&harmful)?, &harmful_targets)?;
        let mut h = safe.f_sub(&harmful)?;
        if self.has_reference() {
            let reference = |name| -> Result<Tensor> { Ok(input.batch.values(name)?.f_to_kind(h.kind())?) };
            h = h.f_sub(&reference(REFERENCE_SAFE)?.f_sub(&reference(REFERENCE_HARMFUL)?)?)?;
        }
        let rows = |values| TermValues::Rows { values, kind: ContinuationKind::Harmful, tokens: None };
        let watched = |name: &str, values: Tensor| -> Result<Term> {
            Ok(Term { name: name.into(), weight: 0.0, values: rows(values.f_detach()?), cut_off: None })
        };
        Ok(vec![
            Term { name: "preference".into(), weight: self.weight, values: rows(self.of_margin(&h)?), cut_off: None },
            watched("margin", h)?,
            watched("safe_log_prob", safe)?,
            watched("harmful_log_prob", harmful)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    fn of(form: PreferenceForm, h: f64) -> f64 {
        let loss = AdvIpoLoss { form, beta: 0.5, ..AdvIpoLoss::default() };
        tensor::number(&loss.of_margin(&Tensor::from(h)).unwrap()).unwrap()
    }

    #[test]
    fn every_form_is_its_formula() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for h in [-2.0, 0.3, 4.0] {
            assert_relative_eq!(of(PreferenceForm::Ipo, h), (h - 1.0f64).powi(2), epsilon = 1e-12);
            let dpo = -0.9 * sigmoid(0.5 * h).ln() - 0.1 * sigmoid(-0.5 * h).ln();
            assert_relative_eq!(of(PreferenceForm::Dpo { label_smoothing: 0.1 }, h), dpo, epsilon = 1e-12);
            assert_relative_eq!(of(PreferenceForm::Hinge, h), (1.0 - 0.5 * h).max(0.0), epsilon = 1e-12);
            let simpo = -sigmoid(0.5 * h - 0.7).ln();
            assert_relative_eq!(of(PreferenceForm::SimPo { margin: 0.7 }, h), simpo, epsilon = 1e-12);
        }
    }

    #[test]
    fn a_published_floor_makes_an_unlikely_token_certain() {
        let log_probs = Tensor::from_slice(&[-1.0, -7.0]);
        let floor = |value, form| tensor::numbers(&Floor { value, form }.apply(&log_probs).unwrap()).unwrap();
        assert_eq!(floor(-5.0, FloorForm::Clamp), [-1.0, -5.0]);
        assert_eq!(floor(-5.0, FloorForm::Zero), [-1.0, 0.0]);
        assert_eq!(floor(f64::NEG_INFINITY, FloorForm::Clamp), [-1.0, -7.0]);
    }

    #[test]
    fn beta_must_be_above_zero() {
        let error = AdvIpoLoss { beta: 0.0, ..AdvIpoLoss::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "loss.adv_ipo.beta = 0: must be above 0 and finite");
    }
}
