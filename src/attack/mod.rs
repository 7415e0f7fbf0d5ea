//! Attacks in embedding space.
//!
//! An attack is an [`EmbeddingAttack`] (how to search) with an [`AttackObjective`] (what for), run by [`AttackRunner`],
//! which owns everything that must be the same for all: the threat set, restarts, starts, the best iterate, and the
//! counting.

mod draws;
mod objective;
mod pgd;
mod probe;
mod runner;
mod search;
mod start;
mod threat;
mod warm;

use tch::Tensor;

pub use draws::Draws;
pub use objective::{AttackObjective, TargetCrossEntropy};
pub use pgd::{Momentum, Pgd, StepRule, StepSize};
pub(crate) use probe::keep_lower;
pub use probe::{Gradient, Probe};
pub use runner::{AttackOutcome, AttackRunner, AttackSettings, AttackStatistics, Iterate};
pub use search::{
    Draft, FoundString, Positions, ProbeSampling, ReadsBack, SearchCost, SearchLoss, SearchPrompt, SearchStep,
    TokenSearch, TokenSearchSettings,
};
pub use start::Start;
pub use threat::{Norm, Radius, Region, ThreatModel};
pub(crate) use warm::WarmStarts;

use crate::{Batch, CausalLm, Perturbation, Result};

/// Finds perturbations for a batch.
///
/// Only [`EmbeddingAttack::threat`] and [`EmbeddingAttack::perturb`] are required. The framework calls `perturb` once
/// per restart with a fresh [`Probe`]; it projects what comes back, refuses what is outside region and sites, keeps the
/// best, and counts the passes made through the probe.
///
/// # Example
///
/// A complete attack: random search, which asks for no gradient.
///
/// ```
/// use advtrain::{EmbeddingAttack, Perturbation, Probe, Result, ThreatModel};
/// use rand_distr::StandardNormal;
///
/// struct RandomSearch {
///     threat: ThreatModel,
///     tries: usize,
/// }
///
/// impl EmbeddingAttack for RandomSearch {
///     fn threat(&self) -> &ThreatModel {
///         &self.threat
///     }
///
///     fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
///         let mut best = probe.start()?;
///         let mut lowest = probe.value(&best)?.f_sum(probe.model().master_kind())?.double_value(&[]);
///         for _ in 0..self.tries {
///             let step = probe.draw(&StandardNormal)?;
///             let size = 0.1 * probe.radius();
///             let candidate = best.zip(&step, |d, step| Ok(d.f_add(&step.f_mul_scalar(size)?)?))?;
///             let value = probe.value(&candidate)?.f_sum(probe.model().master_kind())?.double_value(&[]);
///             if value < lowest {
///                 (best, lowest) = (probe.project(&candidate)?, value);
///             }
///         }
///         Ok(vec![best])
///     }
///
///     fn is_random(&self) -> bool {
///         true
///     }
/// }
/// ```
pub trait EmbeddingAttack: Send {
    /// The threat set. Read for every batch, between [`EmbeddingAttack::reseed`] and [`EmbeddingAttack::perturb`]: an
    /// attack that changes it from batch to batch does so in the former, and keeps it until the next batch. Which kind of
    /// rows is attacked stays as it is.
    fn threat(&self) -> &ThreatModel;

    /// Finds perturbations for the rows that the probe shows: one, or several over whose losses training averages. No
    /// perturbation at all is an error: an attack that finds nothing returns [`Probe::zero`].
    ///
    /// # Errors
    /// Whatever the attack meets.
    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>>;

    /// Checks the attack's own settings; the framework checks the threat set itself. Called before the attack is first
    /// run.
    ///
    /// # Errors
    /// Names the first setting out of range, its value and what is allowed.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Whether [`EmbeddingAttack::perturb`] draws random numbers of its own, so that restarts from the same start end
    /// apart: of an attack that does not, restarts that all begin at zero are refused.
    fn is_random(&self) -> bool {
        false
    }

    /// Replaces the prompts of a batch before it is perturbed (a discrete seed: a paraphrase, a string found by a token
    /// search), or does not. Called once for every batch that has rows to attack, with those rows and their attacked
    /// continuations alone; the new prompts then hold for the rows' other continuations too. Rows, their ids and their
    /// continuations must stay. The passes of the search are not in the statistics.
    ///
    /// # Errors
    /// Whatever the attack meets.
    fn reseed(&mut self, model: &dyn CausalLm, batch: &Batch, draws: Draws) -> Result<Option<Batch>> {
        let _ = (model, batch, draws);
        Ok(None)
    }

    /// The attack and its settings in a text: a checkpoint keeps it, and a run goes on only with the same. The default, the name
    /// of the type, does not know of settings.
    fn describe(&self) -> String {
        std::any::type_name::<Self>().to_string()
    }

    /// How far the steps can move a token (with [`Norm::RowL2`] a row) at most, in the norm of the threat set, where
    /// that is known: if it is less than the radius and every start is zero, the ball never binds, and the trainer warns.
    fn reach(&self, hidden_size: i64, radius: f64) -> Option<f64> {
        let _ = (hidden_size, radius);
        None
    }

    /// What a checkpoint must keep for the attack to go on as if it had never stopped, by name: tensors of floats or int64.
    ///
    /// # Errors
    /// Whatever the attack meets.
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes back what [`EmbeddingAttack::state`] gave, sorted by name, on the model's device.
    ///
    /// # Errors
    /// If the state is not this attack's.
    fn restore(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let _ = state;
        Ok(())
    }
}

impl<A: EmbeddingAttack + ?Sized> EmbeddingAttack for Box<A> {
    fn threat(&self) -> &ThreatModel {
        (**self).threat()
    }
    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        (**self).perturb(probe)
    }
    fn validate(&self) -> Result<()> {
        (**self).validate()
    }
    fn is_random(&self) -> bool {
        (**self).is_random()
    }
    fn reseed(&mut self, model: &dyn CausalLm, batch: &Batch, draws: Draws) -> Result<Option<Batch>> {
        (**self).reseed(model, batch, draws)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn reach(&self, hidden_size: i64, radius: f64) -> Option<f64> {
        (**self).reach(hidden_size, radius)
    }
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        (**self).state()
    }
    fn restore(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        (**self).restore(state)
    }
}
