//! The embedding attack as a measurement.

use crate::{
    AttackObjective, AttackRunner, AttackSettings, AttackStatistics, Batch, CausalLm, ContinuationKind, Draws,
    EmbeddingAttack, Example, Generation, Perturbation, Result, TargetCrossEntropy, tensor,
};

/// One attacked example.
#[derive(Clone, Debug, PartialEq)]
pub struct AttackedRow {
    /// The example's id.
    pub id: String,
    /// The harmful continuation's mean cross-entropy without perturbation, nats per token.
    pub clean_loss: f64,
    /// The same under the perturbation found.
    pub attacked_loss: f64,
    /// What the model says greedily to the perturbed prompt; empty if it was not asked.
    pub answer: Vec<i64>,
}

/// What an embedding attack did to a set of examples.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmbeddingEvaluation {
    /// One entry per example, in order.
    pub rows: Vec<AttackedRow>,
    /// Sums over all of them.
    pub statistics: AttackStatistics,
}

impl EmbeddingEvaluation {
    /// Share of the perturbed tokens at the ball's edge.
    pub fn edge_share(&self) -> f64 {
        self.statistics.tokens_at_edge as f64 / self.statistics.tokens.max(1) as f64
    }

    /// Mean clean and attacked loss of the harmful continuation, nats per token.
    pub fn mean_losses(&self) -> (f64, f64) {
        let count = self.rows.len() as f64;
        let clean: f64 = self.rows.iter().map(|row| row.clean_loss).sum();
        let attacked: f64 = self.rows.iter().map(|row| row.attacked_loss).sum();
        (clean / count, attacked / count)
    }
}

/// Attacks examples, `rows` at a time, and measures the loss of their harmful continuations; with `generation`, also what
/// the model then says to the perturbed prompt.
///
/// # Errors
/// If an example has no harmful continuation, or attack or model fail.
pub fn attack_examples(
    model: &dyn CausalLm,
    examples: &[Example],
    attack: &mut dyn EmbeddingAttack,
    settings: &AttackSettings,
    seed: u64,
    rows: usize,
    generation: Option<&Generation>,
) -> Result<EmbeddingEvaluation> {
    let frozen = model.frozen(false)?;
    let model = frozen.as_deref().unwrap_or(model);
    let mut runner = AttackRunner::new(settings.clone(), attack.threat(), model)?;
    let mut evaluation = EmbeddingEvaluation::default();
    for examples in examples.chunks(rows.max(1)) {
        let harmful = examples.iter().map(|example| example.keep(&[ContinuationKind::Harmful])).collect();
        let batch = Batch::new(harmful, model.device())?;
        let draws = Draws { seed, epoch: 0 };
        let outcome = runner.run(attack, &mut TargetCrossEntropy, model, &batch, draws)?;
        evaluation.statistics.add(&outcome.statistics);
        let perturbed = outcome.batch.as_ref().unwrap_or(&batch);
        let perturbation = outcome.perturbations.first();
        let clean = losses(model, &batch, None)?;
        let attacked = losses(model, perturbed, perturbation)?;
        let said = match generation {
            Some(generation) => model.generate(&prompts(perturbed)?, perturbation, generation)?,
            None => vec![Vec::new(); batch.rows()],
        };
        for (index, answer) in said.into_iter().enumerate() {
            evaluation.rows.push(AttackedRow {
                id: batch.examples()[index].id().to_string(),
                clean_loss: clean[index],
                attacked_loss: attacked[index],
                answer,
            });
        }
    }
    Ok(evaluation)
}

fn prompts(batch: &Batch) -> Result<Batch> {
    Batch::new(batch.examples().iter().map(|example| example.keep(&[])).collect(), batch.device())
}

fn losses(model: &dyn CausalLm, batch: &Batch, perturbation: Option<&Perturbation>) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let input = crate::Input::of_batch(model, batch, perturbation, Default::default())?;
    let hidden = model.hidden(&input)?;
    tensor::numbers(&TargetCrossEntropy.values(model, batch, ContinuationKind::Harmful, &hidden)?)
}
