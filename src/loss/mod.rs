//! Losses.
//!
//! A [`RobustLoss`] looks at rows with a harmful and a safe continuation, a [`UtilityLoss`] at rows with a useful one.
//! Both return named [`Term`]s and leave weights, cut-offs and reduction to the trainer.

mod advipo;
mod advul;
mod supervised;
mod term;

use tch::Tensor;

pub use advipo::{AdvIpoLoss, Floor, FloorForm, LengthNormalisation, PreferenceForm};
pub use advul::{AdvUlLoss, AwayForm};
pub use supervised::{Against, SupervisedLoss};
pub use term::{CutOff, CutOffForm, Reduced, Reduction, Term, TermValues, UpdateSize};

use crate::{Adapter, Batch, CausalLm, ContinuationKind, Hidden, Input, Last, Pass, Perturbation, Result, Targets};

/// What a loss is computed from.
#[derive(Clone, Copy)]
pub struct LossInput<'a> {
    /// The model in training.
    pub model: &'a dyn CausalLm,
    /// The rows: for a [`RobustLoss`] those with a harmful or a safe continuation, for a [`UtilityLoss`] those with a useful one.
    pub batch: &'a Batch,
    /// What the attack found for these rows, if it attacks rows of this kind.
    pub perturbation: Option<&'a Perturbation>,
    /// Whether the adapter's dropout is on.
    pub dropout: bool,
}

impl std::fmt::Debug for LossInput<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LossInput").field("batch", self.batch).field("dropout", &self.dropout).finish_non_exhaustive()
    }
}

impl LossInput<'_> {
    /// One forward pass over the rows, perturbed where there is a perturbation.
    ///
    /// # Errors
    /// If the model fails.
    pub fn hidden(&self, taps: &[usize]) -> Result<Hidden> {
        self.pass(Pass { dropout: self.dropout, taps, ..Pass::default() })
    }

    /// The same, but of final hidden states at least those that predict a target: for [`Hidden::predicting`] and
    /// [`LossInput::target_log_probs`], and cheaper.
    ///
    /// # Errors
    /// If the model fails.
    pub fn predicting_hidden(&self) -> Result<Hidden> {
        self.pass(Pass { dropout: self.dropout, last: Last::Predictors, ..Pass::default() })
    }

    fn pass(&self, pass: Pass) -> Result<Hidden> {
        self.model.hidden(&Input::of_batch(self.model, self.batch, self.perturbation, pass)?)
    }

    /// The original model's hidden states of the unperturbed rows; no gradient reaches them.
    ///
    /// # Errors
    /// If the model fails.
    pub fn reference_hidden(&self, taps: &[usize]) -> Result<Hidden> {
        self.reference_pass(Pass { taps, ..Pass::default() })
    }

    /// The same, but at least of those that predict a target, as [`LossInput::predicting_hidden`] is to [`LossInput::hidden`].
    ///
    /// # Errors
    /// If the model fails.
    pub fn reference_predicting_hidden(&self) -> Result<Hidden> {
        self.reference_pass(Pass { last: Last::Predictors, ..Pass::default() })
    }

    fn reference_pass(&self, pass: Pass) -> Result<Hidden> {
        let _guard = tch::no_grad_guard();
        let pass = Pass { adapter: Adapter::Off, ..pass };
        self.model.hidden(&Input::of_batch(self.model, self.batch, None, pass)?)
    }

    /// The log-probability of each target of the continuations of a kind `[targets]`, and where the targets stand.
    ///
    /// # Errors
    /// If the model fails.
    pub fn target_log_probs(&self, hidden: &Hidden, kind: ContinuationKind) -> Result<(Tensor, Targets)> {
        target_log_probs(self.model, self.batch, hidden, kind)
    }
}

/// The log-probability of each target of the continuations of a kind `[targets]`, and where the targets stand.
pub(crate) fn target_log_probs(
    model: &dyn CausalLm,
    batch: &Batch,
    hidden: &Hidden,
    kind: ContinuationKind,
) -> Result<(Tensor, Targets)> {
    let targets = batch.targets(kind)?;
    let log_probs = model.log_probs(&hidden.predicting(&targets)?, &targets.ids)?;
    Ok((log_probs, targets))
}

/// Numbers computed before training: a name, and for each row a list: of one number, of one for each of the row's tokens, or
/// of one for each target of its harmful or of its safe continuation, and so for every row alike.
pub type Precomputed = Vec<(String, Vec<Vec<f64>>)>;

/// A loss on rows with a harmful continuation.
///
/// Object safe. [`RobustLoss::terms`] is all that must be written.
///
/// # Example
///
/// Raise the loss of the harmful answer, up to a bound, and nothing else:
///
/// ```
/// use advtrain::{ContinuationKind, CutOff, CutOffForm, LossInput, Result, RobustLoss, Term, TermValues};
///
/// struct Away;
///
/// impl RobustLoss for Away {
///     fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
///         let hidden = input.hidden(&[])?;
///         let (log_probs, targets) = input.target_log_probs(&hidden, ContinuationKind::Harmful)?;
///         Ok(vec![Term {
///             name: "away".into(),
///             weight: 1.0,
///             values: TermValues::Rows {
///                 values: targets.mean_per_row(&log_probs)?,
///                 kind: ContinuationKind::Harmful,
///                 tokens: Some(targets.counts),
///             },
///             cut_off: Some(CutOff { threshold: -3.0, slope: 0.0, form: CutOffForm::Continuous }),
///         }])
///     }
/// }
/// ```
pub trait RobustLoss: Send {
    /// The terms of these rows.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>>;

    /// The loss and its settings in a text: a checkpoint keeps it, and a run goes on only with the same; what was computed
    /// before training is read again under it. The default, the name of the type, does not know of settings.
    fn describe(&self) -> String {
        std::any::type_name::<Self>().to_string()
    }

    /// Checks every setting. Called when the trainer is built.
    ///
    /// # Errors
    /// Names the first setting out of range, its value and what is allowed.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// The kinds of continuation that every row must have; checked when the trainer is built.
    fn needs(&self) -> &[ContinuationKind] {
        &[ContinuationKind::Harmful]
    }

    /// The names of the numbers that [`RobustLoss::precompute`] gives for every row; empty: it is not called.
    fn precomputes(&self) -> &[&str] {
        &[]
    }

    /// Numbers that [`RobustLoss::terms`] finds again under their names in [`Batch::values`]: computed once before
    /// training on the original model and the unperturbed rows.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn precompute(&self, reference: &dyn CausalLm, batch: &Batch) -> Result<Precomputed> {
        let _ = (reference, batch);
        Ok(Vec::new())
    }

    /// Whether [`RobustLoss::terms`] asks [`LossInput`] for the original model's hidden states: then the model must have an adapter.
    fn uses_reference(&self) -> bool {
        false
    }
}

/// A loss on rows with a useful continuation.
pub trait UtilityLoss: Send {
    /// The terms of these rows.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>>;

    /// The loss and its settings in a text: a checkpoint keeps it, and a run goes on only with the same. The default, the name
    /// of the type, does not know of settings.
    fn describe(&self) -> String {
        std::any::type_name::<Self>().to_string()
    }

    /// Checks every setting. Called when the trainer is built.
    ///
    /// # Errors
    /// Names the first setting out of range, its value and what is allowed.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Whether [`UtilityLoss::terms`] asks [`LossInput`] for the original model's hidden states: then the model must have an adapter.
    fn uses_reference(&self) -> bool {
        false
    }
}

impl<L: RobustLoss + ?Sized> RobustLoss for Box<L> {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        (**self).terms(input)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn validate(&self) -> Result<()> {
        (**self).validate()
    }
    fn needs(&self) -> &[ContinuationKind] {
        (**self).needs()
    }
    fn precomputes(&self) -> &[&str] {
        (**self).precomputes()
    }
    fn precompute(&self, reference: &dyn CausalLm, batch: &Batch) -> Result<Precomputed> {
        (**self).precompute(reference, batch)
    }
    fn uses_reference(&self) -> bool {
        (**self).uses_reference()
    }
}

impl<L: UtilityLoss + ?Sized> UtilityLoss for Box<L> {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        (**self).terms(input)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn validate(&self) -> Result<()> {
        (**self).validate()
    }
    fn uses_reference(&self) -> bool {
        (**self).uses_reference()
    }
}
