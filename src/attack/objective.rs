//! What an attack drives down.

use tch::Tensor;

use crate::{Batch, CausalLm, ContinuationKind, Hidden, Last, Result};

/// The inner objective: one number per row. An attack looks for the perturbation that makes it small.
///
/// Apart from the optimiser on purpose: any attack works with any objective.
pub trait AttackObjective: Send {
    /// Called once before an attack, for what the objective needs of the unperturbed batch; its passes are not in the
    /// statistics. `rows` is the kind of continuation that is attacked; every row of the batch has one.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn prepare(&mut self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind) -> Result<()> {
        let _ = (model, batch, rows);
        Ok(())
    }

    /// The objective and its settings in a text: a checkpoint keeps it, and a run goes on only with the same. The default, the name
    /// of the type, does not know of settings.
    fn describe(&self) -> String {
        std::any::type_name::<Self>().to_string()
    }

    /// The blocks whose output [`AttackObjective::values`] wants.
    fn taps(&self) -> &[usize] {
        &[]
    }

    /// Of which tokens [`AttackObjective::values`] wants the final hidden states.
    fn last(&self) -> Last {
        Last::All
    }

    /// The objective of each row `[rows]`, differentiable towards `hidden`, what the model gave for the perturbed
    /// batch.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn values(&self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind, hidden: &Hidden) -> Result<Tensor>;
}

impl<O: AttackObjective + ?Sized> AttackObjective for Box<O> {
    fn prepare(&mut self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind) -> Result<()> {
        (**self).prepare(model, batch, rows)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn taps(&self) -> &[usize] {
        (**self).taps()
    }
    fn last(&self) -> Last {
        (**self).last()
    }
    fn values(&self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind, hidden: &Hidden) -> Result<Tensor> {
        (**self).values(model, batch, rows, hidden)
    }
}

/// The paper's objective: the mean cross-entropy of the attacked continuation's target tokens.
///
/// Summed over rows and not averaged over a micro-batch, so that step rules that feel a gradient's size do not depend
/// on what else is in the micro-batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct TargetCrossEntropy;

impl AttackObjective for TargetCrossEntropy {
    fn last(&self) -> Last {
        Last::Predictors
    }

    fn values(&self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind, hidden: &Hidden) -> Result<Tensor> {
        let targets = batch.targets(rows)?;
        let log_probs = model.log_probs(&hidden.predicting(&targets)?, &targets.ids)?;
        targets.mean_per_row(&log_probs.f_neg()?)
    }
}
