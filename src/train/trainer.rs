//! The training loop.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use tch::Tensor;

use super::{
    builder::TrainerBuilder,
    data::{Reference, TrainingData},
    metrics::UpdateMetrics,
    observer::Observer,
    optimizer::AdamW,
    resume::Checkpoints,
    settings::{Grouping, TrainSettings},
};
use crate::{
    AttackObjective, AttackOutcome, AttackRunner, AttackSettings, AttackStatistics, Batch, CausalLm, ContinuationKind,
    Draws, EmbeddingAttack, Error, ErrorKind, Example, LossInput, Perturbation, Result, RobustLoss, Sampler, Source,
    Start, Term, TermValues, TrainableLm, UpdateSize, UtilityLoss, digest::generator, error::Context, tensor,
};

/// Trains a model against an attack.
///
/// Built by [`AdversarialTrainer::builder`] from one attack, one robust loss, at most one utility loss, data and settings.
/// [`AdversarialTrainer::step`] makes one update, [`AdversarialTrainer::run`] all that are left. Without attack and robust
/// loss it is plain supervised fine-tuning.
///
/// An update: rows from the sampler, cut into micro-batches; for each the attack, then the losses on the perturbation found
/// for that micro-batch, then the backward pass; at last clipping and AdamW. The same settings and data give the same run,
/// bit for bit on a CPU, also where it was stopped and resumed. libtorch's generator, which is process-wide, is seeded
/// before every micro-batch for the sake of dropout.
pub struct AdversarialTrainer<M: TrainableLm> {
    pub(super) model: M,
    pub(super) attack: Option<Attacking>,
    pub(super) robust: Option<Box<dyn RobustLoss>>,
    pub(super) utility: Option<Box<dyn UtilityLoss>>,
    pub(super) data: TrainingData,
    pub(super) settings: TrainSettings,
    pub(super) sampler: Sampler,
    pub(super) optimizer: AdamW,
    pub(super) reference: Reference,
    pub(super) observers: Vec<Box<dyn Observer>>,
    pub(super) checkpoints: Option<Checkpoints>,
    pub(super) update: usize,
    pub(super) updates_total: usize,
}

/// The attack with all that belongs to it.
pub(super) struct Attacking {
    pub(super) attack: Box<dyn EmbeddingAttack>,
    objective: Box<dyn AttackObjective>,
    pub(super) runner: AttackRunner,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// All updates are made.
    Completed,
    /// Stopped from outside; a checkpoint holds what was done.
    Stopped,
}

impl<M: TrainableLm> std::fmt::Debug for AdversarialTrainer<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdversarialTrainer")
            .field("update", &self.update)
            .field("updates_total", &self.updates_total)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Attacking {
    pub(super) fn new(
        attack: Box<dyn EmbeddingAttack>,
        settings: AttackSettings,
        objective: Box<dyn AttackObjective>,
        model: &dyn CausalLm,
    ) -> Result<Self> {
        let from_zero = settings.start == Start::Zero && !settings.warm_start;
        let runner = AttackRunner::new(settings, attack.as_ref(), model)?;
        let radius = runner.radius();
        let reach = attack.reach(model.hidden_size(), radius).filter(|_| attack.threat().bounded && from_zero);
        if let Some(reach) = reach.filter(|reach| *reach < radius) {
            tracing::warn!(reach, radius, "the attack's steps cannot reach the edge of the ball, which never binds");
        }
        Ok(Self { attack, objective, runner })
    }
}

/// What an update adds up over its micro-batches.
#[derive(Default)]
struct Sums {
    loss: f64,
    terms: BTreeMap<String, f64>,
    attack: AttackStatistics,
    tokens: usize,
    utility_tokens: usize,
}

/// The micro-batches of an update, and what a reduction must know of all of them.
struct UpdatePlan {
    micro_batches: Vec<Vec<(Source, usize)>>,
    /// Continuations of each kind.
    rows: BTreeMap<ContinuationKind, usize>,
    /// Micro-batches with rows of the robust loss.
    robust: usize,
    /// Micro-batches with rows of the utility loss.
    utility: usize,
}

/// The continuations that make a row one of the robust loss.
const ROBUST: [ContinuationKind; 2] = [ContinuationKind::Harmful, ContinuationKind::Safe];
/// The continuation that makes a row one of the utility loss.
const UTILITY: [ContinuationKind; 1] = [ContinuationKind::Utility];

impl<M: TrainableLm> AdversarialTrainer<M> {
    /// Begins with the model; it must have something to train.
    pub fn builder(model: M) -> TrainerBuilder<M> {
        TrainerBuilder::new(model)
    }

    /// Adds one who sees the metrics of every update.
    pub fn observe(&mut self, observer: impl Observer + 'static) {
        self.observers.push(Box::new(observer));
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Gives the model back.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Updates made.
    pub fn updates_done(&self) -> usize {
        self.update
    }

    /// Updates of the whole run.
    pub fn updates_total(&self) -> usize {
        self.updates_total
    }

    /// Epsilon of the attack, in the units of what is perturbed.
    pub fn radius(&self) -> Option<f64> {
        self.attack.as_ref().map(|attack| attack.runner.radius())
    }

    /// Makes one update.
    ///
    /// # Errors
    /// If a plug-in or libtorch fails, or a loss or gradient is not finite. The weights are then as before the update, unless
    /// memory ran out in the optimiser's step itself; what attacks keep from batch to batch may have moved on. Go on from the
    /// last checkpoint.
    pub fn step(&mut self) -> Result<UpdateMetrics> {
        let begin = Instant::now();
        let update = self.update;
        let plan = self.plan(update);
        self.optimizer.zero_gradients()?;
        let mut sums = Sums::default();
        for (index, rows) in plan.micro_batches.iter().enumerate() {
            self.micro_batch(index, rows, &plan, &mut sums)
                .context(|| format!("making update {}, micro-batch {}", update + 1, index + 1))?;
        }
        let norm = self.optimizer.gradient_norm()?;
        let factor = self.settings.schedule.factor(update, self.updates_total);
        let learning_rate = self.settings.optimizer.learning_rate * factor;
        self.optimizer.step(learning_rate, norm).context(|| format!("making update {}", update + 1))?;
        self.optimizer.zero_gradients()?;
        self.update += 1;
        Ok(UpdateMetrics {
            update: self.update,
            updates_total: self.updates_total,
            epoch: self.sampler.epoch_of(update as u64),
            learning_rate,
            gradient_norm: norm,
            loss: sums.loss,
            terms: sums.terms,
            attack: self.attack.is_some().then(|| (&sums.attack).into()),
            rows: plan.micro_batches.iter().map(Vec::len).sum(),
            tokens: sums.tokens,
            utility_tokens: sums.utility_tokens,
            micro_batches: plan.micro_batches.len(),
            seconds: begin.elapsed().as_secs_f64(),
        })
    }

    fn plan(&self, update: usize) -> UpdatePlan {
        let drawn = self.sampler.batch(update as u64);
        let mut rows = BTreeMap::new();
        for place in &drawn {
            for continuation in self.data.get(*place).continuations() {
                *rows.entry(continuation.kind).or_default() += 1;
            }
        }
        let size = self.settings.micro_batch_size;
        let micro_batches: Vec<Vec<_>> = match self.settings.grouping {
            Grouping::AsDrawn => drawn.chunks(size).map(<[_]>::to_vec).collect(),
            Grouping::ByLength => {
                let of = |source| {
                    let mut rows: Vec<_> = drawn.iter().filter(|place| place.0 == source).copied().collect();
                    rows.sort_by_key(|place| self.data.get(*place).len());
                    rows.chunks(size).map(<[_]>::to_vec).collect::<Vec<_>>()
                };
                [of(Source::Robust), of(Source::Utility)].concat()
            }
        };
        let with_rows = |kinds: &[ContinuationKind]| {
            let has_one = |place: &(Source, usize)| {
                self.data.get(*place).continuations().iter().any(|one| kinds.contains(&one.kind))
            };
            micro_batches.iter().filter(|rows| rows.iter().any(has_one)).count()
        };
        UpdatePlan { robust: with_rows(&ROBUST), utility: with_rows(&UTILITY), micro_batches, rows }
    }

    fn micro_batch(
        &mut self,
        index: usize,
        rows: &[(Source, usize)],
        plan: &UpdatePlan,
        sums: &mut Sums,
    ) -> Result<()> {
        self.seed_dropout(index);
        let examples: Vec<Example> = rows.iter().map(|place| self.data.get(*place).clone()).collect();
        let of_utility =
            |row: &Example| Some(row.prompt().len() + row.continuation(ContinuationKind::Utility)?.tokens.len());
        sums.utility_tokens += examples.iter().filter_map(of_utility).sum::<usize>();
        let names = self.robust.as_ref().map_or(&[][..], |loss| loss.precomputes());
        let batch = self.reference.batch(examples, names, self.model.device())?;
        sums.tokens += batch.layout().tokens();
        let outcome = self.run_attack(&batch, sums)?;
        let (reseeded, perturbations) = match outcome {
            Some(outcome) => (outcome.batch, outcome.perturbations),
            None => (None, Vec::new()),
        };
        let batch = reseeded.as_ref().unwrap_or(&batch);
        let perturbations: Vec<Option<&Perturbation>> =
            if perturbations.is_empty() { vec![None] } else { perturbations.iter().map(Some).collect() };
        for perturbation in &perturbations {
            let terms = self.terms(batch, *perturbation, plan)?;
            self.backward(&terms, 1.0 / perturbations.len() as f64, plan, sums)?;
        }
        Ok(())
    }

    /// libtorch's generator decides dropout alone; everything else has generators of its own.
    fn seed_dropout(&self, micro_batch: usize) {
        use rand::RngExt;
        let mut random = generator(self.settings.seed, "dropout", format!("{}\0{micro_batch}", self.update));
        tch::manual_seed(i64::from(random.random::<u32>()));
    }

    fn run_attack(&mut self, batch: &Batch, sums: &mut Sums) -> Result<Option<AttackOutcome>> {
        let Some(Attacking { attack, objective, runner }) = &mut self.attack else { return Ok(None) };
        let source = if UTILITY.contains(&attack.threat().rows) { Source::Utility } else { Source::Robust };
        let draws = Draws { seed: self.settings.seed, epoch: self.sampler.pass_of(source, self.update as u64) };
        let outcome =
            runner.run(attack.as_mut(), objective.as_mut(), &self.model, batch, draws).context(|| "attacking")?;
        sums.attack.add(&outcome.statistics);
        Ok(Some(outcome))
    }

    /// The terms of both losses, each with the number of micro-batches that have rows of its loss.
    fn terms(
        &self,
        batch: &Batch,
        perturbation: Option<&Perturbation>,
        plan: &UpdatePlan,
    ) -> Result<Vec<(Term, usize)>> {
        let attacks_utility = self.attack.as_ref().is_some_and(|attack| UTILITY.contains(&attack.attack.threat().rows));
        let mut terms = Vec::new();
        if let (Some(loss), Some(rows)) = (&self.robust, batch.select(&ROBUST)?) {
            let perturbation = perturbation.filter(|_| !attacks_utility);
            let perturbation = perturbation.map(|one| one.restrict(&rows.rows)).transpose()?;
            let of_loss = loss.terms(&self.loss_input(&rows.batch, perturbation.as_ref()))?;
            check_terms(&of_loss, &rows.batch, plan)?;
            terms.extend(of_loss.into_iter().map(|term| (term, plan.robust)));
        }
        if let (Some(loss), Some(rows)) = (&self.utility, batch.select(&UTILITY)?) {
            let perturbation = perturbation.filter(|_| attacks_utility);
            let perturbation = perturbation.map(|one| one.restrict(&rows.rows)).transpose()?;
            let of_loss = loss.terms(&self.loss_input(&rows.batch, perturbation.as_ref()))?;
            check_terms(&of_loss, &rows.batch, plan)?;
            terms.extend(of_loss.into_iter().map(|term| (term, plan.utility)));
        }
        Ok(terms)
    }

    fn loss_input<'a>(&'a self, batch: &'a Batch, perturbation: Option<&'a Perturbation>) -> LossInput<'a> {
        LossInput { model: &self.model, batch, perturbation, dropout: self.settings.dropout }
    }

    fn backward(&self, terms: &[(Term, usize)], share: f64, plan: &UpdatePlan, sums: &mut Sums) -> Result<()> {
        let mut total: Option<Tensor> = None;
        for (term, with_rows) in terms {
            let rows = match &term.values {
                TermValues::Rows { kind, .. } => plan.rows.get(kind).copied().unwrap_or(0),
                TermValues::Update(_) => 0,
            };
            let size =
                UpdateSize { rows, micro_batches: plan.micro_batches.len(), micro_batches_with_rows: *with_rows };
            let reduced = term.reduce(self.settings.reduction, size)?;
            *sums.terms.entry(term.name.clone()).or_default() += share * tensor::number(&reduced.mean)?;
            if term.weight != 0.0 {
                total = Some(match total {
                    Some(total) => total.f_add(&reduced.loss)?,
                    None => reduced.loss,
                });
            }
        }
        let Some(total) = total else { return Ok(()) };
        let total = total.f_mul_scalar(share)?;
        let value = tensor::number(&total)?;
        if !value.is_finite() {
            return Err(ErrorKind::NotFinite { what: "loss".into(), value }.into());
        }
        sums.loss += value;
        // A loss of constants alone (a utility loss of weight 0 on a batch of its own, say) has nothing to go back to.
        if total.requires_grad() {
            total.f_backward()?;
        }
        Ok(())
    }

    /// Makes all updates that are left, shows each to the observers, and writes checkpoints. `stop` is looked at between
    /// updates: once it is true, a checkpoint is written and the run ends.
    ///
    /// # Errors
    /// As [`AdversarialTrainer::step`], or if an observer fails or a checkpoint cannot be written; at once if another process is
    /// at work in the folder, or it holds checkpoints of an earlier run and [`AdversarialTrainer::resume`] was not called.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Finish> {
        self.hold_folder()?;
        let finish = self.make_updates(stop);
        self.release_folder();
        finish
    }

    fn make_updates(&mut self, stop: &AtomicBool) -> Result<Finish> {
        self.check_folder()?;
        while self.update < self.updates_total {
            if stop.load(Ordering::Relaxed) {
                self.save_checkpoint()?;
                self.finish_observers()?;
                return Ok(Finish::Stopped);
            }
            let metrics = self.step()?;
            tracing::info!(
                update = metrics.update,
                of = metrics.updates_total,
                loss = metrics.loss,
                seconds = metrics.seconds,
                "update made"
            );
            for observer in &mut self.observers {
                observer.update(&metrics)?;
                observer.inspect(&metrics, &self.model)?;
            }
            let every = self.settings.checkpoint_every;
            if every > 0 && self.update.is_multiple_of(every) && self.update < self.updates_total {
                self.save_checkpoint()?;
            }
        }
        self.save_checkpoint()?;
        self.finish_observers()?;
        Ok(Finish::Completed)
    }

    fn finish_observers(&mut self) -> Result<()> {
        self.observers.iter_mut().try_for_each(|observer| observer.finish())
    }
}

/// A term must have one value for each row that the loss was given, of continuations that rows of the update have: what a
/// loss forgot to average would otherwise be summed, and weigh more than anyone wanted.
fn check_terms(terms: &[Term], batch: &Batch, plan: &UpdatePlan) -> Result<()> {
    for term in terms {
        let TermValues::Rows { values, kind, tokens } = &term.values else { continue };
        for (what, tensor) in [("values", Some(values)), ("tokens", tokens.as_ref())] {
            if let Some(tensor) = tensor.filter(|tensor| tensor.size() != [batch.rows() as i64]) {
                let expected = format!("[{}], one for each row", batch.rows());
                return Err(Error::mismatch(
                    format!("{what} of the term {:?}", term.name),
                    expected,
                    format!("{:?}", tensor.size()),
                ));
            }
        }
        if !plan.rows.contains_key(kind) {
            let expected = format!("one of {:?}, which the rows have", plan.rows.keys());
            return Err(Error::mismatch(format!("kind of the term {:?}", term.name), expected, format!("{kind:?}")));
        }
    }
    Ok(())
}
