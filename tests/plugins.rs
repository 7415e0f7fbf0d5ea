//! Attacks, objectives and losses of a user's own: each is a type in this file and nothing else.

mod common;
#[path = "common/toy.rs"]
mod toy;

use std::sync::{Arc, Mutex, atomic::AtomicBool};

use advtrain::{
    AdvUlLoss, AdversarialTrainer, AttackObjective, AttackSettings, Batch, CausalLm, ContinuationKind, EmbeddingAttack,
    Grouping, Hidden, Iterate, LossInput, Norm, Pass, Perturbation, Probe, Radius, Region, Result, RobustLoss, Site,
    Start, SupervisedLoss, TargetCrossEntropy, Term, TermValues, ThreatModel, TrainSettings, TrainableLm, TrainingData,
    UtilityLoss,
    tch::{Kind, Tensor},
};
use approx::assert_relative_eq;
use common::distance;
use rand_distr::Uniform;
use toy::{HIDDEN, Watched, all_weights, attacked, batch, cross_entropy, decoder, numbers, robust, useful, with_lora};

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
    // Not to the last bit: only unperturbed rows share their beginning, so that products are of other shapes.
    let (clean, perturbed) = (tapped(None), tapped(Some(found)));
    let moved = [0, 1].map(|at| distance(&perturbed[at], &clean[at]));
    assert!(moved[0] < 1e-13 && moved[1] > 1e-2, "{moved:?}");
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
            .utility(SupervisedLoss { weight: 0.0, ..Default::default() })
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
