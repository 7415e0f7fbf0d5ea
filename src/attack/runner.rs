//! What is the same for every attack.

use serde::{Deserialize, Serialize};

use super::{
    AttackObjective, Draws, EmbeddingAttack, Probe, Start, WarmStarts, probe::keep_lower, threat::ThreatModel,
};
use crate::{Batch, CausalLm, ContinuationKind, Error, Perturbation, Result, tensor};

/// Which iterate of an attack is returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Iterate {
    /// The last one (the paper's).
    #[default]
    Last,
    /// For each row the one with the lowest objective; costs one forward pass more for each restart.
    Best,
}

/// What the framework does around an attack.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `start` | `zero` | where each restart begins | |
/// | `restarts` | 1 | run so often, keep the best of each row | at least 1; more only where they begin or end apart |
/// | `iterate` | `last` | which iterate counts | |
/// | `warm_start` | false | begin the first restart where the last attack on the same prompt ended | |
/// | `dropout` | false | the adapter's dropout on, redrawn at every pass | |
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttackSettings {
    /// Where each restart begins.
    pub start: Start,
    /// How often the attack is run; the best result of each row is kept. Several cost one forward pass more each, to compare.
    pub restarts: usize,
    /// Which iterate counts.
    pub iterate: Iterate,
    /// Begin the first restart where the last attack on the same prompt ended, with whatever target.
    pub warm_start: bool,
    /// The adapter's dropout is on, redrawn at every pass.
    pub dropout: bool,
}

impl Default for AttackSettings {
    fn default() -> Self {
        Self { start: Start::Zero, restarts: 1, iterate: Iterate::Last, warm_start: false, dropout: false }
    }
}

impl AttackSettings {
    /// What goes around [`super::Pgd::measuring`]: the best iterate of three restarts from uniform starts.
    pub fn measuring() -> Self {
        Self { start: Start::Uniform, restarts: 3, iterate: Iterate::Best, ..Self::default() }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        Error::check_count("attack_settings.restarts", self.restarts)
    }

    /// Refuses restarts that would begin alike, and so end alike.
    pub(crate) fn check_restarts(&self, attack: &dyn EmbeddingAttack) -> Result<()> {
        // With warm starts the first one begins apart from the others.
        let most = if self.warm_start { 2 } else { 1 };
        if self.restarts > most && self.start == Start::Zero && !self.dropout && !attack.is_random() {
            let allowed =
                format!("at most {most} where more would begin at zero alike; set start = \"uniform\" or \"gaussian\"");
            return Err(Error::setting("attack_settings.restarts", self.restarts, allowed));
        }
        Ok(())
    }
}

/// The result of an attack on a batch.
#[derive(Debug, Default)]
pub struct AttackOutcome {
    /// The batch with other prompts, where the attack replaced them.
    pub batch: Option<Batch>,
    /// The perturbations, by rows of the whole batch; none if no row is of the attacked kind.
    pub perturbations: Vec<Perturbation>,
    /// What the attack did.
    pub statistics: AttackStatistics,
}

/// What an attack did. Sums over rows, so that the statistics of micro-batches add up.
///
/// A token's size is what the ball bounds: the L2 norm of its vector, with [`super::Norm::Linf`] its largest number,
/// with [`super::Norm::RowL2`] the norm of its whole row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttackStatistics {
    /// Rows attacked.
    pub rows: usize,
    /// The objective at the first candidate, summed over rows.
    pub objective_first: f64,
    /// The objective of the last candidate tried, which need not be what is returned, summed over rows; of what is returned
    /// where restarts or the best iterate are compared.
    pub objective_last: f64,
    /// Perturbed tokens, times sites and perturbations returned.
    pub tokens: usize,
    /// Those of them whose size is at least 0.999 of the radius: at the edge of the ball, or beyond it where it does
    /// not bound.
    pub tokens_at_edge: usize,
    /// Their sizes, as shares of the radius, summed.
    pub relative_size: f64,
    /// Epsilon in the units of what is perturbed; the largest, where batches had different ones.
    pub radius: f64,
    /// Forward passes through [`Probe::gradient`] and [`Probe::value`], those of the framework itself included.
    pub forward_passes: u64,
    /// Backward passes through [`Probe::gradient`].
    pub backward_passes: u64,
    /// Tokens of prompts and continuations that the forward passes read.
    pub pass_tokens: u64,
}

impl AttackStatistics {
    /// Adds the statistics of another batch.
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.objective_first += other.objective_first;
        self.objective_last += other.objective_last;
        self.tokens += other.tokens;
        self.tokens_at_edge += other.tokens_at_edge;
        self.relative_size += other.relative_size;
        self.radius = self.radius.max(other.radius);
        self.forward_passes += other.forward_passes;
        self.backward_passes += other.backward_passes;
        self.pass_tokens += other.pass_tokens;
    }
}

/// Runs an attack: freezes the model, restarts, keeps the best, checks the ball, counts.
#[derive(Debug)]
pub struct AttackRunner {
    settings: AttackSettings,
    /// The threat set of the last run, or of the attack that the runner was made for. Checked.
    threat: ThreatModel,
    /// What a relative radius is relative to.
    embedding_norm: f64,
    warm: WarmStarts,
}

/// The best result over restarts so far: the objective of each row, and the perturbation.
type BestSoFar = Option<(Vec<f64>, Perturbation)>;

impl AttackRunner {
    /// For this attack on this model. The mean norm of the embeddings, which a radius may be relative to, is taken
    /// here, since the embeddings can change in training.
    ///
    /// # Errors
    /// If a setting is out of range, a site is not in the model, or libtorch fails.
    pub fn new(settings: AttackSettings, attack: &dyn EmbeddingAttack, model: &dyn CausalLm) -> Result<Self> {
        settings.validate()?;
        settings.check_restarts(attack)?;
        attack.validate()?;
        let threat = attack.threat().clone();
        threat.check(model)?;
        Ok(Self { settings, threat, embedding_norm: model.mean_embedding_norm()?, warm: WarmStarts::default() })
    }

    /// Epsilon in the units of what is perturbed: of the last run's threat set, or before that of the attack's first
    /// one.
    pub fn radius(&self) -> f64 {
        self.threat.radius_for(self.embedding_norm)
    }

    /// Perturbations kept from earlier attacks.
    pub(crate) fn warm_starts(&self) -> &WarmStarts {
        &self.warm
    }

    /// Puts back the perturbations of a checkpoint.
    pub(crate) fn set_warm_starts(&mut self, warm: WarmStarts) {
        self.warm = warm;
    }

    /// Attacks the rows of a batch that have a continuation of the attacked kind. No weight's gradient changes.
    ///
    /// # Errors
    /// If the attack, the objective or the model fails, an objective is not finite, what comes back is nothing or
    /// outside the threat set, or the threat set is another than before and does not fit the model.
    pub fn run(
        &mut self,
        attack: &mut dyn EmbeddingAttack,
        objective: &mut dyn AttackObjective,
        model: &dyn CausalLm,
        batch: &Batch,
        draws: Draws,
    ) -> Result<AttackOutcome> {
        let rows = self.threat.rows;
        check_kind(attack, rows)?;
        let Some(mut selection) = batch.select(&[rows])? else { return Ok(AttackOutcome::default()) };
        let frozen = model.frozen(self.settings.dropout)?;
        let model = frozen.as_deref().unwrap_or(model);
        let mut whole = None;
        if let Some(reseeded) = attack.reseed(model, &selection.batch, draws)? {
            check_reseeded(&selection.batch, &reseeded)?;
            whole = Some(batch.with_prompts_of(&reseeded, &selection.rows)?);
            selection.batch = reseeded;
        }
        check_kind(attack, rows)?;
        self.follow(attack.threat(), model)?;
        {
            let _guard = tch::no_grad_guard();
            objective.prepare(model, &selection.batch, rows)?;
        }
        let mut statistics =
            AttackStatistics { rows: selection.batch.rows(), radius: self.radius(), ..Default::default() };
        let found = self.restarts(attack, &*objective, model, &selection.batch, draws, &mut statistics)?;
        check_kind(attack, rows)?;
        self.measure(&found, &mut statistics)?;
        if let (true, Some(last)) = (self.settings.warm_start, found.last()) {
            self.warm.keep(last, &selection.batch)?;
        }
        let perturbations = found.into_iter().map(|one| one.renumber(&selection.rows)).collect::<Result<_>>()?;
        Ok(AttackOutcome { batch: whole, perturbations, statistics })
    }

    /// Takes over a threat set that is not the last one, if it fits the model.
    fn follow(&mut self, threat: &ThreatModel, model: &dyn CausalLm) -> Result<()> {
        if *threat != self.threat {
            threat.check(model)?;
            self.threat = threat.clone();
        }
        Ok(())
    }

    fn restarts(
        &self,
        attack: &mut dyn EmbeddingAttack,
        objective: &dyn AttackObjective,
        model: &dyn CausalLm,
        batch: &Batch,
        draws: Draws,
        statistics: &mut AttackStatistics,
    ) -> Result<Vec<Perturbation>> {
        let mut best: BestSoFar = None;
        let mut found = Vec::new();
        for restart in 0..self.settings.restarts {
            let mut probe = Probe::new(model, batch, objective, &self.threat, self.radius());
            probe.dropout = self.settings.dropout;
            probe.start = self.settings.start;
            probe.warm = (self.settings.warm_start && restart == 0).then_some(&self.warm);
            probe.draw_from(draws, restart);
            let returned = attack.perturb(&mut probe)?;
            if returned.is_empty() {
                return Err(Error::mismatch("perturbations of an attack", "at least one", 0));
            }
            found = returned.iter().map(|one| probe.project(one)).collect::<Result<Vec<_>>>()?;
            if self.must_compare() {
                best = Some(self.compare(&mut probe, &found, best)?);
            }
            let first = probe.log.first.as_deref().unwrap_or_default().iter().sum::<f64>();
            statistics.objective_first += if restart == 0 { first } else { 0.0 };
            statistics.objective_last = probe.log.last.iter().sum();
            statistics.forward_passes += probe.log.forward;
            statistics.backward_passes += probe.log.backward;
            statistics.pass_tokens += probe.log.tokens;
        }
        Ok(match best {
            Some((values, perturbation)) => {
                statistics.objective_last = values.iter().sum();
                vec![perturbation]
            }
            None => found,
        })
    }

    fn must_compare(&self) -> bool {
        self.settings.restarts > 1 || self.settings.iterate == Iterate::Best
    }

    /// The better, row by row, of what was found before and what this restart found.
    fn compare(&self, probe: &mut Probe, found: &[Perturbation], best: BestSoFar) -> Result<(Vec<f64>, Perturbation)> {
        let [only] = found else {
            let expected = "one perturbation where restarts or the best iterate compare them";
            return Err(Error::mismatch("perturbations of an attack", expected, found.len()));
        };
        let values = tensor::numbers(&probe.value(only)?)?;
        let this = match (self.settings.iterate, std::mem::take(&mut probe.log.best)) {
            (Iterate::Best, Some(best)) => best,
            _ => (values, only.snapshot()?),
        };
        match best {
            None => Ok(this),
            Some((values, held)) => keep_lower(values, held, &this.0, &this.1),
        }
    }

    fn measure(&self, found: &[Perturbation], statistics: &mut AttackStatistics) -> Result<()> {
        let radius = self.radius();
        for perturbation in found {
            let extent = self.threat.measure(perturbation, radius)?;
            statistics.tokens += extent.tokens;
            statistics.tokens_at_edge += extent.at_edge;
            statistics.relative_size += extent.size_sum / radius;
        }
        Ok(())
    }
}

/// An attack stays on one kind of rows: which losses are computed on its perturbations depends on that.
fn check_kind(attack: &dyn EmbeddingAttack, rows: ContinuationKind) -> Result<()> {
    let now = attack.threat().rows;
    if now != rows {
        let allowed = format!("{rows:?} as before: an attack stays on one kind of rows");
        return Err(Error::setting("attack.threat.rows", format!("{now:?}"), allowed));
    }
    Ok(())
}

fn check_reseeded(batch: &Batch, reseeded: &Batch) -> Result<()> {
    if batch.rows() != reseeded.rows() {
        return Err(Error::mismatch("rows of a reseeded batch", batch.rows(), reseeded.rows()));
    }
    for (old, new) in batch.examples().iter().zip(reseeded.examples()) {
        if old.id() != new.id() || old.continuations() != new.continuations() {
            return Err(Error::example(old.id(), "reseeding changed more than its prompt"));
        }
    }
    Ok(())
}
