//! Attacks, objectives and losses of a user's own: each is a type in this file and nothing else.

#[path = "common/toy.rs"]
mod toy;

use std::sync::{Arc, Mutex, atomic::AtomicBool};

use advtrain::{
    AdvUlLoss, AdversarialTrainer, AttackObjective, AttackRunner, AttackSettings, Batch, CausalLm, ContinuationKind,
    Draws, EmbeddingAttack, Error, Grouping, Hidden, Iterate, LossInput, Norm, Observer, Pass, Perturbation, Probe,
    Radius, Region, Result, RobustLoss, Site, Start, SupervisedLoss, TargetCrossEntropy, Term, TermValues, ThreatModel,
    TrainSettings, TrainableLm, TrainingData, UpdateMetrics, UtilityLoss,
    tch::{Kind, Tensor},
};
use approx::assert_relative_eq;
use rand_distr::Uniform;
use toy::{HIDDEN, all_weights, attacked, batch, cross_entropy, decoder, numbers, robust, useful, with_lora};

/// Latent adversarial training: Adam on perturbations of what enters chosen blocks.
struct Latent {
    threat: ThreatModel,
    steps: i32,
}

impl EmbeddingAttack for Latent {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let (mut found, mut mean, mut square) = (probe.start()?, probe.zero()?, probe.zero()?);
        let rate = 0.3 * probe.radius();
        for step in 1..=self.steps {
            let gradient = probe.gradient(&found)?.gradient;
            mean = mean.zip(&gradient, |mean, g| Ok(mean * 0.9 + g * 0.1))?;
            square = square.zip(&gradient, |square, g| Ok(square * 0.99 + g.square() * 0.01))?;
            let direction = mean.zip(&square, |mean, square| {
                let root = (square / (1.0 - 0.99f64.powi(step))).sqrt() + 1e-8;
                Ok(mean / (1.0 - 0.9f64.powi(step)) / root)
            })?;
            found = probe.project(&found.zip(&direction, |found, direction| Ok(found - direction * rate))?)?;
        }
        Ok(vec![found])
    }
}

fn latent(sites: Vec<Site>) -> Latent {
    Latent { threat: ThreatModel { sites, radius: Radius::Absolute(0.7), ..ThreatModel::default() }, steps: 6 }
}

#[test]
fn a_latent_attack_perturbs_blocks_and_nothing_before_them() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let outcome =
        attacked(&mut latent(vec![Site::Block(1)]), &mut TargetCrossEntropy, AttackSettings::default(), &model, &rows);
    let found = &outcome.unwrap().perturbations[0];
    let harmful = |perturbation| numbers(&cross_entropy(&model, &rows, ContinuationKind::Harmful, perturbation));
    for (clean, perturbed) in harmful(None).iter().zip(harmful(Some(found))) {
        assert!(perturbed < clean - 0.05, "{clean} to {perturbed}");
    }
    for size in numbers(&found.parts()[0].1.norm_scalaropt_dim(2, [1], false)) {
        assert!(size > 0.0 && size <= 0.7 * (1.0 + 1e-12), "{size}");
    }
    let tapped = |perturbation| {
        let pass = Pass { taps: &[0, 1], ..Pass::default() };
        let input = advtrain::Input::of_batch(&model, &rows, perturbation, pass).unwrap();
        model.hidden(&input).unwrap().tapped
    };
    let (clean, perturbed) = (tapped(None), tapped(Some(found)));
    assert!(clean[0].equal(&perturbed[0]));
    assert!(!clean[1].equal(&perturbed[1]));
}

#[test]
fn a_latent_attack_trains() {
    let attack = latent(vec![Site::Block(0), Site::Block(1)]);
    let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
        .attack(attack, AttackSettings::default())
        .robust(AdvUlLoss::default())
        .data(TrainingData { robust: (0..4).map(robust).collect(), utility: Vec::new() })
        .settings(TrainSettings { batch_size: 4, micro_batch_size: 2, ..TrainSettings::default() })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    let attack = metrics.attack.unwrap();
    assert!(attack.objective_last < attack.objective_first - 0.05);
    // The loss meets what the attack found: log p of the harmful answer is above the clean one.
    assert!(metrics.terms["away"] > -attack.objective_first + 0.05);
    assert_eq!((attack.forward_passes, attack.backward_passes), (12, 12));
}

/// The number that a state holds under the name "turn".
fn turn_of(state: &[(String, Tensor)]) -> Result<i64> {
    match state.iter().find(|(name, _)| name == "turn") {
        Some((_, turn)) => Ok(turn.f_int64_value(&[0])?),
        None => Err(Error::mismatch("state of an attack", "a tensor \"turn\"", format!("{state:?}"))),
    }
}

/// A pool of texts that take the place of the user's, one after the other; then a step in embedding space around them.
struct Seeds {
    threat: ThreatModel,
    pool: Vec<Vec<i64>>,
    turn: i64,
}

impl EmbeddingAttack for Seeds {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn reseed(&mut self, _: &dyn CausalLm, batch: &Batch, _: Draws) -> Result<Option<Batch>> {
        let seed = &self.pool[self.turn as usize % self.pool.len()];
        self.turn += 1;
        let mut seeded = batch.with_user_content(0, seed)?;
        for row in 1..batch.rows() {
            seeded = seeded.with_user_content(row, seed)?;
        }
        Ok(Some(seeded))
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let start = probe.start()?;
        let (gradient, size) = (probe.gradient(&start)?.gradient, 0.5 * probe.radius());
        Ok(vec![start.zip(&gradient, |d, g| Ok(d - g / (g.norm_scalaropt_dim(2, [1], true) + 1e-30) * size))?])
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![("turn".into(), Tensor::from_slice(&[self.turn]))])
    }

    fn restore(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.turn = turn_of(&state)?;
        Ok(())
    }
}

/// The ids of a prompt, and how many places of it were perturbed.
type Seen = (Vec<i64>, usize);

/// C-AdvUL, and a note of the prompts and perturbed places that it met.
struct Watched {
    loss: AdvUlLoss,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl RobustLoss for Watched {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let places = input.perturbation.map_or(0, |one| one.places().len());
        let prompt = input.batch.examples()[0].prompt().ids().to_vec();
        self.seen.lock().unwrap().push((prompt, places));
        self.loss.terms(input)
    }
}

/// Raises a flag after an update.
struct StopAfter(usize, Arc<AtomicBool>);

impl Observer for StopAfter {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        self.1.store(metrics.update >= self.0, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn a_discrete_seed_replaces_the_prompt_and_goes_on_after_a_checkpoint() {
    let pool = vec![vec![20, 21, 22, 23], vec![19], vec![18, 17]];
    let trainer = |folder: &std::path::Path, seen: &Arc<Mutex<Vec<_>>>| {
        let attack = Seeds { threat: ThreatModel::default(), pool: pool.clone(), turn: 0 };
        AdversarialTrainer::builder(with_lora(0.0))
            .attack(attack, AttackSettings::default())
            .robust(Watched { loss: AdvUlLoss::default(), seen: seen.clone() })
            .data(TrainingData { robust: vec![robust(1)], utility: Vec::new() })
            .settings(TrainSettings { batch_size: 1, epochs: 4, ..TrainSettings::default() })
            .folder(folder)
            .build()
            .unwrap()
    };
    let (seen, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
    let folder = tempfile::tempdir().unwrap();
    let mut first = trainer(folder.path(), &seen);
    first.observe(StopAfter(2, stop.clone()));
    first.run(&stop).unwrap();
    let mut second = trainer(folder.path(), &seen);
    assert_eq!(second.resume().unwrap(), 2);
    second.run(&AtomicBool::new(false)).unwrap();
    let expected: Vec<(Vec<i64>, usize)> = (0..4)
        .map(|turn| [&[1, 2], pool[turn % 3].as_slice(), &[3]].concat())
        .map(|ids| (ids.clone(), ids.len()))
        .collect();
    assert_eq!(*seen.lock().unwrap(), expected);
}

/// Several attacks by turns, one for each batch.
struct Turns {
    attacks: Vec<Box<dyn EmbeddingAttack>>,
    begun: i64,
}

impl Turns {
    fn index(&self) -> usize {
        (self.begun - 1).max(0) as usize % self.attacks.len()
    }
}

impl EmbeddingAttack for Turns {
    fn threat(&self) -> &ThreatModel {
        self.attacks[self.index()].threat()
    }

    fn validate(&self) -> Result<()> {
        self.attacks.iter().try_for_each(|attack| attack.validate())
    }

    fn is_random(&self) -> bool {
        self.attacks.iter().all(|attack| attack.is_random())
    }

    fn reseed(&mut self, model: &dyn CausalLm, batch: &Batch, draws: Draws) -> Result<Option<Batch>> {
        self.begun += 1;
        let index = self.index();
        self.attacks[index].reseed(model, batch, draws)
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let index = self.index();
        self.attacks[index].perturb(probe)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = vec![("turn".into(), Tensor::from_slice(&[self.begun]))];
        for (index, attack) in self.attacks.iter().enumerate() {
            state.extend(attack.state()?.into_iter().map(|(name, tensor)| (format!("{index}/{name}"), tensor)));
        }
        Ok(state)
    }

    fn restore(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.begun = turn_of(&state)?;
        for (index, attack) in self.attacks.iter_mut().enumerate() {
            let prefix = format!("{index}/");
            let own = state.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?, tensor)));
            attack.restore(own.map(|(name, tensor)| (name.to_string(), tensor.shallow_clone())).collect())?;
        }
        Ok(())
    }
}

/// A discrete seed with embeddings within 0.1 of their mean norm, then a latent attack at `block` within 1.
fn by_turns(block: usize) -> Turns {
    let seeds = Seeds { threat: ThreatModel::default(), pool: vec![vec![20, 21], vec![19, 18]], turn: 0 };
    let mut inside = latent(vec![Site::Block(block)]);
    inside.threat.radius = Radius::Absolute(1.0);
    Turns { attacks: vec![Box::new(seeds), Box::new(inside)], begun: 0 }
}

#[test]
fn attacks_by_turns_are_held_to_the_threat_set_of_the_turn() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let norms = numbers(&model.embedding().norm_scalaropt_dim(2, [1], false));
    let relative = 0.1 * norms.iter().sum::<f64>() / norms.len() as f64;
    assert!(relative < 0.5);
    let mut attack = by_turns(1);
    let mut runner = AttackRunner::new(AttackSettings::default(), &attack, &model).unwrap();
    for (turn, (radius, site)) in
        [(relative, Site::Embeddings), (1.0, Site::Block(1)), (relative, Site::Embeddings)].into_iter().enumerate()
    {
        let draws = Draws { seed: 0, epoch: 0 };
        let outcome = runner.run(&mut attack, &mut TargetCrossEntropy, &model, &rows, draws).unwrap();
        assert_relative_eq!(outcome.statistics.radius, radius, max_relative = 1e-12);
        assert_relative_eq!(runner.radius(), radius, max_relative = 1e-12);
        let (of, values) = &outcome.perturbations[0].parts()[0];
        assert_eq!((*of, outcome.batch.is_some()), (site, turn != 1));
        let sizes = numbers(&values.norm_scalaropt_dim(2, [1], false));
        let largest = sizes.iter().fold(0.0f64, |largest, size| largest.max(*size));
        // The steps reach the ball's edge inside, and half of the way at the embeddings.
        let expected = if site == Site::Embeddings { 0.5 * radius } else { radius };
        assert_relative_eq!(largest, expected, max_relative = 1e-9);
        let mean = sizes.iter().sum::<f64>() / radius;
        assert_relative_eq!(outcome.statistics.relative_size, mean, max_relative = 1e-9);
    }
}

#[test]
fn a_threat_set_that_does_not_fit_the_model_is_refused_when_its_turn_comes() {
    let (model, rows) = (decoder(), batch(vec![robust(1)]));
    let mut attack = by_turns(9);
    let mut runner = AttackRunner::new(AttackSettings::default(), &attack, &model).unwrap();
    let mut run = || {
        let outcome = runner.run(&mut attack, &mut TargetCrossEntropy, &model, &rows, Draws { seed: 0, epoch: 0 });
        outcome.map(|_| ()).map_err(|error| error.to_string())
    };
    run().unwrap();
    assert_eq!(
        run().unwrap_err(),
        "attack.threat.sites = Block(9): must be a block below 2, the number that the model has"
    );
}

/// Notes the attack's radius of every update.
struct Radii(Arc<Mutex<Vec<f64>>>);

impl Observer for Radii {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        self.0.lock().unwrap().push(metrics.attack.as_ref().expect("an attack").radius);
        Ok(())
    }
}

#[test]
fn attacks_by_turns_go_on_after_a_checkpoint() {
    let (radii, seen): (Arc<Mutex<Vec<f64>>>, Arc<Mutex<Vec<Seen>>>) = Default::default();
    let folder = tempfile::tempdir().unwrap();
    let trainer = || {
        let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
            .attack(by_turns(1), AttackSettings::default())
            .robust(Watched { loss: AdvUlLoss::default(), seen: seen.clone() })
            .data(TrainingData { robust: vec![robust(1)], utility: Vec::new() })
            .settings(TrainSettings { batch_size: 1, epochs: 5, ..TrainSettings::default() })
            .folder(folder.path())
            .build()
            .unwrap();
        trainer.observe(Radii(radii.clone()));
        trainer
    };
    let stop = Arc::new(AtomicBool::new(false));
    let mut first = trainer();
    first.observe(StopAfter(1, stop.clone()));
    first.run(&stop).unwrap();
    let mut second = trainer();
    assert_eq!(second.resume().unwrap(), 1);
    second.run(&AtomicBool::new(false)).unwrap();
    let at_block: Vec<bool> = radii.lock().unwrap().iter().map(|radius| *radius == 1.0).collect();
    assert_eq!(at_block, [false, true, false, true, false]);
    // The prompts of robust(1) have the ids 5 and 12 where the seeds stand by turns.
    let users: Vec<Vec<i64>> = seen.lock().unwrap().iter().map(|(ids, _)| ids[2..ids.len() - 1].to_vec()).collect();
    assert_eq!(users, [[20, 21], [5, 12], [19, 18], [5, 12], [20, 21]]);
}

/// SMART and ALUM: as far as possible, in KL, from what the model predicts for the unperturbed prompt.
#[derive(Default)]
struct CleanKl {
    clean: Option<Tensor>, // [targets, hidden]
}

impl CleanKl {
    fn predictors(batch: &Batch, rows: ContinuationKind, hidden: &Hidden) -> Result<Tensor> {
        Ok(hidden.last.f_index_select(0, &batch.targets(rows)?.predictors)?)
    }
}

impl AttackObjective for CleanKl {
    fn prepare(&mut self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind) -> Result<()> {
        let input = advtrain::Input::of_batch(model, batch, None, Pass::default())?;
        self.clean = Some(Self::predictors(batch, rows, &model.hidden(&input)?)?);
        Ok(())
    }

    fn values(&self, model: &dyn CausalLm, batch: &Batch, rows: ContinuationKind, hidden: &Hidden) -> Result<Tensor> {
        let kl = model.kl(&Self::predictors(batch, rows, hidden)?, self.clean.as_ref().expect("prepared"))?;
        batch.targets(rows)?.mean_per_row(&-kl)
    }
}

#[test]
fn an_objective_of_ones_own_is_driven_down_from_a_random_start() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let settings = AttackSettings { start: Start::Uniform, iterate: Iterate::Best, ..AttackSettings::default() };
    let outcome = attacked(&mut advtrain::Pgd::default(), &mut CleanKl::default(), settings, &model, &rows).unwrap();
    let statistics = outcome.statistics;
    assert!(statistics.objective_first < 0.0, "a random start is away from the clean prediction");
    assert!(statistics.objective_last < 2.0 * statistics.objective_first);
    // KL from its formula, on the harmful continuations alone.
    let harmful = rows.select(&[ContinuationKind::Harmful]).unwrap().unwrap().batch;
    let targets = harmful.targets(ContinuationKind::Harmful).unwrap();
    let log_probs = |perturbation| {
        let input = advtrain::Input::of_batch(&model, &harmful, perturbation, Pass::default()).unwrap();
        let hidden = model.hidden(&input).unwrap().last.index_select(0, &targets.predictors);
        model.logits(&hidden).unwrap().log_softmax(-1, Kind::Double)
    };
    let (clean, perturbed) = (log_probs(None), log_probs(Some(&outcome.perturbations[0])));
    let kl = (clean.exp() * (&clean - perturbed)).sum_dim_intlist([-1].as_slice(), false, Kind::Double);
    let sum: f64 = numbers(&targets.mean_per_row(&kl).unwrap()).iter().sum();
    assert_relative_eq!(-statistics.objective_last, sum, max_relative = 1e-9);
}

/// NEFTune: noise uniform in ±alpha / sqrt(tokens * hidden) on supervised data.
struct Neftune {
    threat: ThreatModel,
    alpha: f64,
}

impl EmbeddingAttack for Neftune {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let noise = probe.draw(&Uniform::new(-1.0, 1.0).expect("a range"))?;
        let tokens = probe.places().iter().map(|place| {
            let row = probe.batch().layout().rows()[place.row].prompt();
            self.alpha / ((row.len() as i64 * probe.model().hidden_size()) as f64).sqrt()
        });
        let scale = Tensor::from_slice(&tokens.collect::<Vec<_>>()).unsqueeze(1); // [places, 1]
        Ok(vec![noise.map(|noise| Ok(noise * &scale))?])
    }
}

/// A perturbation, the prompt lengths of the batch's rows, and the loss by hand.
type SeenUtility = (Perturbation, Vec<i64>, f64);

/// The supervised loss, and a note of the perturbation and of the loss by hand.
struct WatchedUtility(Arc<Mutex<Vec<SeenUtility>>>);

impl UtilityLoss for WatchedUtility {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let loss = cross_entropy(input.model, input.batch, ContinuationKind::Utility, input.perturbation);
        let lengths = input.batch.layout().rows().iter().map(|row| row.prompt().len() as i64).collect();
        let perturbation = input.perturbation.expect("noise on utility rows").snapshot()?;
        self.0.lock().unwrap().push((perturbation, lengths, numbers(&loss).iter().sum()));
        SupervisedLoss::default().terms(input)
    }
}

#[test]
fn noise_on_utility_rows_needs_no_pass_and_leaves_the_others_alone() {
    let threat = ThreatModel {
        rows: ContinuationKind::Utility,
        region: Region::Prompt,
        norm: Norm::Linf,
        radius: Radius::Absolute(5.0),
        ..ThreatModel::default()
    };
    let (noted, seen) = (Arc::default(), Arc::default());
    let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
        .attack(Neftune { threat, alpha: 5.0 }, AttackSettings::default())
        .robust(Watched { loss: AdvUlLoss::default(), seen: Arc::clone(&seen) })
        .utility(WatchedUtility(Arc::clone(&noted)))
        .data(TrainingData { robust: (0..3).map(robust).collect(), utility: (0..5).map(useful).collect() })
        .settings(TrainSettings {
            batch_size: 8,
            micro_batch_size: 5,
            utility_share: 0.625,
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    let attack = metrics.attack.as_ref().unwrap();
    assert_eq!((attack.rows, attack.forward_passes, attack.backward_passes), (5, 0, 0));
    assert!(seen.lock().unwrap().iter().all(|(_, places)| *places == 0));
    let noted = noted.lock().unwrap();
    let [(noise, lengths, loss)] = noted.as_slice() else { panic!("{} micro-batches", noted.len()) };
    assert_relative_eq!(metrics.terms["utility"], loss / 5.0, max_relative = 1e-12);
    let (site, values) = &noise.parts()[0];
    assert_eq!((*site, noise.places().len() as i64), (Site::Embeddings, lengths.iter().sum()));
    let mut shares = Vec::new();
    for (at, place) in noise.places().iter().enumerate() {
        let bound = 5.0 / ((lengths[place.row] * HIDDEN) as f64).sqrt();
        shares.extend(numbers(&(values.get(at as i64) / bound)));
    }
    assert!(shares.iter().all(|share| share.abs() <= 1.0));
    // Uniform in ±1: the mean square is 1/3, that of the mean of n numbers has deviation 0.3 / sqrt(n).
    let mean_square = shares.iter().map(|share| share * share).sum::<f64>() / shares.len() as f64;
    assert!((mean_square - 1.0 / 3.0).abs() < 4.0 * 0.3 / (shares.len() as f64).sqrt(), "{mean_square}");
}

/// FreeLB: every iterate of the ascent counts, not the last alone.
struct FreeLb {
    threat: ThreatModel,
    steps: usize,
}

impl EmbeddingAttack for FreeLb {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut iterates = vec![probe.start()?];
        let size = 0.5 * probe.radius();
        for step in 0..self.steps - 1 {
            let gradient = probe.gradient(&iterates[step])?.gradient;
            let moved = iterates[step].zip(&gradient, |d, g| Ok(d - g / (g.norm() + 1e-30) * size))?;
            iterates.push(probe.project(&moved)?);
        }
        Ok(iterates)
    }
}

/// Minus log p of the harmful answer, as one value per row.
struct Harmful;

impl RobustLoss for Harmful {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let values = cross_entropy(input.model, input.batch, ContinuationKind::Harmful, input.perturbation);
        let values = TermValues::Rows { values, kind: ContinuationKind::Harmful, tokens: None };
        Ok(vec![Term { name: "harmful".into(), weight: 1.0, values, cut_off: None }])
    }
}

#[test]
fn the_gradient_is_the_mean_over_several_perturbations() {
    let threat = || ThreatModel { norm: Norm::RowL2, radius: Radius::Absolute(1.0), ..ThreatModel::default() };
    let (model, examples) = (all_weights(), vec![robust(2)]);
    let rows = batch(examples.clone());
    let outcome = attacked(
        &mut FreeLb { threat: threat(), steps: 3 },
        &mut TargetCrossEntropy,
        AttackSettings::default(),
        &model,
        &rows,
    );
    let iterates = outcome.unwrap().perturbations;
    let losses: Vec<Tensor> = (iterates.iter())
        .map(|one| cross_entropy(&model, &rows, ContinuationKind::Harmful, Some(one)).mean(Kind::Double))
        .collect();
    let loss = Tensor::stack(&losses, 0).mean(Kind::Double);
    let weights: Vec<Tensor> = model.parameters().into_iter().map(|one| one.tensor).collect();
    let gradients = Tensor::run_backward(&[&loss], &weights, false, false);
    let squares: f64 = gradients.iter().map(|one| numbers(&one.square().sum(Kind::Double))[0]).sum();
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .attack(FreeLb { threat: threat(), steps: 3 }, AttackSettings::default())
        .robust(Harmful)
        .data(TrainingData { robust: examples, utility: Vec::new() })
        .settings(TrainSettings { batch_size: 1, ..TrainSettings::default() })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    assert_eq!(iterates.len(), 3);
    assert_relative_eq!(metrics.gradient_norm, squares.sqrt(), max_relative = 1e-9);
    assert_relative_eq!(metrics.loss, numbers(&loss)[0], max_relative = 1e-9);
    // The last iterate alone would give another number.
    assert!((metrics.loss - numbers(&losses[2])[0]).abs() > 1e-3);
}

/// ER-CAT: the variance of the singular values of the embedding table, and nothing else.
struct Spread;

impl RobustLoss for Spread {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let table = input.model.embedding(); // [vocabulary, hidden]
        let singular = table.tr().matmul(table).linalg_eigvalsh("L").sqrt(); // [hidden]
        Ok(vec![Term {
            name: "spread".into(),
            weight: 2.0,
            values: TermValues::Update(singular.var(false)),
            cut_off: None,
        }])
    }
}

#[test]
fn a_penalty_on_weights_counts_once_per_update() {
    for (micro_batch_size, grouping) in
        [1, 2, 4].map(|size| [(size, Grouping::ByLength), (size, Grouping::AsDrawn)]).concat()
    {
        let model = all_weights();
        let (table, rank) = (model.embedding().detach().copy(), HIDDEN as f64);
        let by_hand = |table: &Tensor| {
            let mean = numbers(&table.svd(true, true).1.sum(Kind::Double))[0] / rank;
            numbers(&table.square().sum(Kind::Double))[0] / rank - mean * mean
        };
        let mut trainer = AdversarialTrainer::builder(model)
            .robust(Spread)
            .utility(SupervisedLoss { weight: 0.0 })
            .data(TrainingData { robust: (0..4).map(robust).collect(), utility: (0..3).map(useful).collect() })
            .settings(TrainSettings {
                batch_size: 7,
                utility_share: 3.0 / 7.0,
                micro_batch_size,
                grouping,
                epochs: 5,
                ..TrainSettings::default()
            })
            .build()
            .unwrap();
        let metrics = trainer.step().unwrap();
        assert_relative_eq!(metrics.terms["spread"], by_hand(&table), max_relative = 1e-9);
        assert_relative_eq!(metrics.loss, 2.0 * by_hand(&table), max_relative = 1e-9);
        trainer.run(&AtomicBool::new(false)).unwrap();
        assert!(by_hand(trainer.model().embedding()) < by_hand(&table) - 1e-5);
    }
}
