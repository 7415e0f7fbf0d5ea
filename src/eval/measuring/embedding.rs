//! The embedding attack as a measurement.

use ndarray::{Array1, ArrayD};

use super::answers::losses_of_rows;
use crate::{
    AttackRunner, AttackSettings, AttackStatistics, Batch, CausalLm, ContinuationKind, Draws, EmbeddingAttack, Error,
    Example, Generation, Perturbation, Result, Site, TargetCrossEntropy, attack::keep_lower,
};

/// How examples are attacked to measure a model.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// What the framework does around the attack.
    pub attack: AttackSettings,
    /// Decides every random number.
    pub seed: u64,
    /// Examples that are attacked together: what memory allows. The result of each depends on it by rounding alone.
    pub rows: usize,
    /// What the model says to the perturbed prompts; `None`: it is not asked.
    pub generation: Option<Generation>,
    /// Whether the perturbations are kept, for analysis.
    pub keep_perturbations: bool,
}

/// One attacked example.
#[derive(Clone, Debug, PartialEq)]
pub struct AttackedRow {
    /// The example's id.
    pub id: String,
    /// Cross-entropy of each target token of the harmful continuation without perturbation `[targets]`, nats.
    pub clean_losses: Array1<f64>,
    /// The same under the perturbation found.
    pub attacked_losses: Array1<f64>,
    /// What the model says to the perturbed prompt; empty if it was not asked.
    pub answer: Vec<i64>,
    /// The perturbation at each site `[perturbed tokens, hidden]`, if it was to be kept.
    pub perturbation: Vec<(Site, ArrayD<f64>)>,
}

impl AttackedRow {
    /// Mean cross-entropy without perturbation, nats per token.
    pub fn clean_loss(&self) -> f64 {
        self.clean_losses.mean().unwrap_or(f64::NAN)
    }

    /// Mean cross-entropy under the perturbation found, nats per token.
    pub fn attacked_loss(&self) -> f64 {
        self.attacked_losses.mean().unwrap_or(f64::NAN)
    }
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
    /// Adds the examples of another evaluation behind these.
    pub fn extend(&mut self, other: Self) {
        self.rows.extend(other.rows);
        self.statistics.add(&other.statistics);
    }

    /// Share of the perturbed tokens at the ball's edge.
    pub fn edge_share(&self) -> f64 {
        self.statistics.tokens_at_edge as f64 / self.statistics.tokens as f64
    }

    /// Mean over examples of the harmful continuation's clean and attacked loss, nats per token.
    pub fn mean_losses(&self) -> (f64, f64) {
        let mean = |of: fn(&AttackedRow) -> f64| self.rows.iter().map(of).sum::<f64>() / self.rows.len() as f64;
        (mean(AttackedRow::clean_loss), mean(AttackedRow::attacked_loss))
    }
}

/// Attacks examples and measures the loss of their harmful continuations, and what the model then says.
///
/// Of several perturbations that an attack returns, each row counts the one with the lowest loss.
///
/// # Errors
/// If an example has no harmful continuation, the attack is on rows of another kind, `measurement.rows` is 0, or attack or
/// model fail.
pub fn attack_examples(
    model: &dyn CausalLm,
    examples: &[Example],
    attack: &mut dyn EmbeddingAttack,
    measurement: &Measurement,
) -> Result<EmbeddingEvaluation> {
    let rows = attack.threat().rows;
    if rows != ContinuationKind::Harmful {
        return Err(Error::setting("attack.threat.rows", format!("{rows:?}"), "harmful, whose loss is measured"));
    }
    Error::check_count("rows", measurement.rows)?;
    let frozen = model.frozen(measurement.attack.dropout)?;
    let model = frozen.as_deref().unwrap_or(model);
    let mut runner = AttackRunner::new(measurement.attack.clone(), attack, model)?;
    let mut evaluation = EmbeddingEvaluation::default();
    for examples in examples.chunks(measurement.rows) {
        let batch = Batch::of_kind(examples, ContinuationKind::Harmful, model.device())?;
        let draws = Draws { seed: measurement.seed, epoch: 0 };
        let outcome = runner.run(attack, &mut TargetCrossEntropy, model, &batch, draws)?;
        evaluation.statistics.add(&outcome.statistics);
        let perturbed = outcome.batch.as_ref().unwrap_or(&batch);
        evaluation.rows.extend(measure(model, (&batch, perturbed), outcome.perturbations, measurement)?);
    }
    Ok(evaluation)
}

/// What an attack found for a batch: of each row the losses of its harmful continuation, and the perturbation.
struct Found {
    losses: Vec<Array1<f64>>,
    perturbation: Perturbation,
}

impl Found {
    fn new(model: &dyn CausalLm, batch: &Batch, perturbation: Perturbation) -> Result<Self> {
        let losses = losses_of_rows(model, batch, ContinuationKind::Harmful, Some(&perturbation))?;
        Ok(Self { losses, perturbation })
    }

    /// For each row the one under which its harmful continuation is likelier.
    fn stronger(self, other: Self) -> Result<Self> {
        let means = |losses: &[Array1<f64>]| losses.iter().map(|one| one.mean().unwrap_or(f64::INFINITY)).collect();
        let (held, others): (Vec<f64>, Vec<f64>) = (means(&self.losses), means(&other.losses));
        let both = self.losses.into_iter().zip(other.losses);
        let losses = both.enumerate().map(|(row, (a, b))| if others[row] < held[row] { b } else { a }).collect();
        let (_, perturbation) = keep_lower(held, self.perturbation, &others, &other.perturbation)?;
        Ok(Self { losses, perturbation })
    }
}

/// Losses and answers of one batch: `clean` before and `perturbed` after the attack replaced prompts.
fn measure(
    model: &dyn CausalLm,
    (clean, perturbed): (&Batch, &Batch),
    perturbations: Vec<Perturbation>,
    measurement: &Measurement,
) -> Result<Vec<AttackedRow>> {
    let clean_losses = losses_of_rows(model, clean, ContinuationKind::Harmful, None)?;
    let mut found = perturbations.into_iter().map(|one| Found::new(model, perturbed, one));
    let first = found.next().ok_or_else(|| Error::mismatch("perturbations of an attack", "at least one", 0))?;
    let Found { losses, perturbation } = found.try_fold(first?, |best, one| best.stronger(one?))?;
    let answers = match &measurement.generation {
        Some(generation) => model.generate(&prompts(perturbed)?, Some(&perturbation), generation)?,
        None => vec![Vec::new(); clean.rows()],
    };
    let rows = clean_losses.into_iter().zip(losses).zip(answers).enumerate();
    rows.map(|(row, ((clean_losses, attacked_losses), answer))| {
        let kept = if measurement.keep_perturbations { arrays(&perturbation.restrict(&[row])?)? } else { Vec::new() };
        let id = clean.examples()[row].id().to_string();
        Ok(AttackedRow { id, clean_losses, attacked_losses, answer, perturbation: kept })
    })
    .collect()
}

fn arrays(perturbation: &Perturbation) -> Result<Vec<(Site, ArrayD<f64>)>> {
    let sites = perturbation.parts().iter().map(|(site, _)| *site);
    let array = |site| Ok(perturbation.to_array(site)?.map(|array| (site, array)));
    sites.filter_map(|site| array(site).transpose()).collect()
}

fn prompts(batch: &Batch) -> Result<Batch> {
    Batch::new(batch.examples().iter().map(|example| example.keep(&[])).collect(), batch.device())
}
