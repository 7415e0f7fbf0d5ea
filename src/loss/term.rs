//! Named terms of a loss, and how they become one number.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{ContinuationKind, Error, Result};

/// One term of a loss. A loss gives the values; the trainer applies the cut-off, reduces over the whole update, weighs
/// and sums, so that no loss can depend on how the update was cut into micro-batches.
#[derive(Debug)]
pub struct Term {
    /// What the term is called in the metrics.
    pub name: String,
    /// What the reduced term is multiplied by.
    pub weight: f64,
    /// The values.
    pub values: TermValues,
    /// Where the term stops to count.
    pub cut_off: Option<CutOff>,
}

/// The values of a term.
#[derive(Debug)]
pub enum TermValues {
    /// One value per row.
    Rows {
        /// `[rows]`, of rows that have a continuation of `kind`.
        values: Tensor,
        /// Which continuations the values are of: the term is divided by their number in the whole update.
        kind: ContinuationKind,
        /// Tokens that each value is a mean over `[rows]`; [`Reduction::MicroBatch`] weighs by them. `None`: rows weigh
        /// the same in every reduction.
        tokens: Option<Tensor>,
    },
    /// One number for the update, a penalty on weights say: computed for every micro-batch that has rows of the loss,
    /// averaged over those.
    Update(Tensor),
}

/// A threshold below which a term goes on with a small slope, so that it is not driven further.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CutOff {
    /// Values below this are cut off.
    pub threshold: f64,
    /// The slope below the threshold.
    pub slope: f64,
    /// How the two pieces meet.
    pub form: CutOffForm,
}

/// How a cut-off continues below its threshold c, with slope s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CutOffForm {
    /// c + s (L - c): continuous.
    Continuous,
    /// c + s L, as published: jumps by s c at the threshold.
    Jumping,
}

impl CutOff {
    /// The values after the cut-off, of any shape.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn apply(&self, values: &Tensor) -> Result<Tensor> {
        let offset = match self.form {
            CutOffForm::Continuous => self.threshold * (1.0 - self.slope),
            CutOffForm::Jumping => self.threshold,
        };
        let cut = values.f_mul_scalar(self.slope)?.f_add_scalar(offset)?;
        Ok(values.f_where_self(&values.f_ge(self.threshold)?, &cut)?)
    }
}

/// How the values of all rows become one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// The cut-off is applied to every row's value; the term is their sum divided by the number of such rows in the
    /// whole update. A row weighs the same whatever is beside it.
    #[default]
    PerRow,
    /// As published: a mean over the tokens of the micro-batch, the cut-off applied to that mean, averaged over
    /// micro-batches. A row's weight depends on what else is in its micro-batch.
    MicroBatch,
}

/// What a reduction must know of the whole update.
#[derive(Clone, Copy, Debug)]
pub struct UpdateSize {
    /// Continuations of the term's kind in the whole update.
    pub rows: usize,
    /// Micro-batches in the update.
    pub micro_batches: usize,
    /// Those of them that have rows of the term's loss.
    pub micro_batches_with_rows: usize,
}

/// One micro-batch's share of a term.
#[derive(Debug)]
pub struct Reduced {
    /// What this micro-batch adds to the loss: weighed, and a scalar in the master dtype.
    pub loss: Tensor,
    /// What it adds to the term's mean value over the update, before weight and cut-off, for the metrics.
    pub mean: Tensor,
}

impl Term {
    /// This micro-batch's share of the update's loss.
    ///
    /// # Errors
    /// If the values are not one-dimensional, or libtorch fails.
    pub fn reduce(&self, reduction: Reduction, update: UpdateSize) -> Result<Reduced> {
        let micro_batches = update.micro_batches.max(1) as f64;
        let (loss, mean) = match &self.values {
            TermValues::Update(value) => {
                let micro_batches = update.micro_batches_with_rows.max(1) as f64;
                (self.cut(value)?.f_div_scalar(micro_batches)?, value.f_div_scalar(micro_batches)?)
            }
            TermValues::Rows { values, tokens, .. } => {
                if values.dim() != 1 {
                    return Err(Error::mismatch(
                        format!("term {}", self.name),
                        "[rows]",
                        format!("{:?}", values.size()),
                    ));
                }
                let rows = update.rows.max(1) as f64;
                let mean = values.f_sum(values.kind())?.f_div_scalar(rows)?;
                match reduction {
                    Reduction::PerRow => (self.cut(values)?.f_sum(values.kind())?.f_div_scalar(rows)?, mean),
                    Reduction::MicroBatch => {
                        let value = self.cut(&weighted_mean(values, tokens.as_ref())?)?;
                        (value.f_div_scalar(micro_batches)?, mean)
                    }
                }
            }
        };
        Ok(Reduced { loss: loss.f_mul_scalar(self.weight)?, mean: mean.f_detach()? })
    }

    fn cut(&self, values: &Tensor) -> Result<Tensor> {
        match self.cut_off {
            Some(cut_off) => cut_off.apply(values),
            None => Ok(values.shallow_clone()),
        }
    }
}

fn weighted_mean(values: &Tensor, tokens: Option<&Tensor>) -> Result<Tensor> {
    match tokens {
        None => Ok(values.f_mean(values.kind())?),
        Some(tokens) => {
            let tokens = tokens.f_to_kind(values.kind())?;
            let total = tokens.f_sum(None::<Kind>)?;
            Ok(values.f_mul(&tokens)?.f_sum(values.kind())?.f_div(&total)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use tch::Device;

    use super::*;
    use crate::tensor::{number, numbers};

    fn term(values: &[f64], tokens: Option<&[f64]>, cut_off: Option<CutOff>) -> Term {
        let values = TermValues::Rows {
            values: Tensor::from_slice(values).to_device(Device::Cpu),
            kind: ContinuationKind::Harmful,
            tokens: tokens.map(Tensor::from_slice),
        };
        Term { name: "away".into(), weight: 0.5, values, cut_off }
    }

    fn cut_off(form: CutOffForm) -> CutOff {
        CutOff { threshold: -5.0, slope: 0.001, form }
    }

    #[test]
    fn the_published_cut_off_jumps_and_ours_does_not() {
        let at = |form, value: f64| number(&cut_off(form).apply(&Tensor::from(value)).unwrap()).unwrap();
        let step = 1e-9;
        for (form, jump) in [(CutOffForm::Continuous, 0.0), (CutOffForm::Jumping, 0.005)] {
            let difference = at(form, -5.0) - at(form, -5.0 - step);
            assert_relative_eq!(difference, jump, epsilon = 1e-6);
            assert_relative_eq!(at(form, -7.0) - at(form, -6.0), -0.001, epsilon = 1e-12);
            assert_eq!(at(form, -4.9), -4.9);
        }
        assert_relative_eq!(at(CutOffForm::Jumping, -6.0), -5.0 - 0.006, epsilon = 1e-12);
        assert_relative_eq!(at(CutOffForm::Continuous, -6.0), -5.001, epsilon = 1e-12);
    }

    #[test]
    fn per_row_does_not_depend_on_micro_batches_and_published_does() {
        let (values, tokens) = ([-6.0, -1.0, -2.0, -3.0], [1.0, 10.0, 4.0, 4.0]);
        let total = |reduction, size: usize| -> f64 {
            let parts = values.chunks(size).zip(tokens.chunks(size)).map(|(values, tokens)| {
                let update = UpdateSize { rows: 4, micro_batches: 4 / size, micro_batches_with_rows: 4 / size };
                let reduced =
                    term(values, Some(tokens), Some(cut_off(CutOffForm::Continuous))).reduce(reduction, update);
                number(&reduced.unwrap().loss).unwrap()
            });
            parts.sum()
        };
        let by_hand = 0.5 * (-5.001 - 1.0 - 2.0 - 3.0) / 4.0;
        for size in [1, 2, 4] {
            assert_relative_eq!(total(Reduction::PerRow, size), by_hand, epsilon = 1e-12);
        }
        let whole = 0.5 * (-6.0 - 10.0 - 8.0 - 12.0) / 19.0;
        assert_relative_eq!(total(Reduction::MicroBatch, 4), whole, epsilon = 1e-12);
        let halves = 0.5 * (-16.0 / 11.0 - 20.0 / 8.0) / 2.0;
        assert_relative_eq!(total(Reduction::MicroBatch, 2), halves, epsilon = 1e-12);
    }

    /// Micro-batches without rows of the kind count in the published mean, and not in the mean per row.
    #[test]
    fn the_published_mean_is_over_all_micro_batches() {
        let update = UpdateSize { rows: 10, micro_batches: 8, micro_batches_with_rows: 5 };
        let loss =
            |reduction| number(&term(&[-1.0, -3.0], None, None).reduce(reduction, update).unwrap().loss).unwrap();
        assert_relative_eq!(loss(Reduction::MicroBatch), 0.5 * -2.0 / 8.0, epsilon = 1e-12);
        assert_relative_eq!(loss(Reduction::PerRow), 0.5 * -4.0 / 10.0, epsilon = 1e-12);
    }

    #[test]
    fn a_number_for_the_update_is_averaged_over_the_micro_batches_of_its_loss() {
        let penalty =
            Term { name: "p".into(), weight: 2.0, values: TermValues::Update(Tensor::from(3.0)), cut_off: None };
        let reduced = penalty
            .reduce(Reduction::PerRow, UpdateSize { rows: 0, micro_batches: 7, micro_batches_with_rows: 4 })
            .unwrap();
        assert_eq!(numbers(&reduced.loss).unwrap(), [1.5]);
    }

    #[test]
    fn a_number_for_the_update_is_cut_off_before_it_is_shared_out() {
        let size = UpdateSize { rows: 0, micro_batches: 4, micro_batches_with_rows: 4 };
        let reduced = |value: f64| {
            let values = TermValues::Update(Tensor::from(value));
            let penalty =
                Term { name: "p".into(), weight: 2.0, values, cut_off: Some(cut_off(CutOffForm::Continuous)) };
            let reduced = penalty.reduce(Reduction::PerRow, size).unwrap();
            [&reduced.loss, &reduced.mean].map(|tensor| number(tensor).unwrap())
        };
        // A quarter of -6 is not below the threshold of -5.
        for (value, cut) in [(-6.0, -5.001), (-4.0, -4.0)] {
            let [loss, mean] = reduced(value);
            assert_relative_eq!(loss, 2.0 * cut / 4.0, epsilon = 1e-12);
            assert_relative_eq!(mean, value / 4.0, epsilon = 1e-12);
        }
    }
}
