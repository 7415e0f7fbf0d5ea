//! Attacks of a user's own that change prompts, or take turns, and so have a state for checkpoints.

#[path = "common/toy.rs"]
mod toy;

use std::sync::{Arc, Mutex, atomic::AtomicBool};

use advtrain::{
    AdvUlLoss, AdversarialTrainer, AttackRunner, AttackSettings, Batch, CausalLm, ContinuationKind, Draws,
    EmbeddingAttack, Error, LossInput, Observer, Perturbation, Pgd, Probe, Radius, Result, Site, StepRule, StepSize,
    SupervisedLoss, TargetCrossEntropy, Term, ThreatModel, TrainSettings, TrainingData, UpdateMetrics, UtilityLoss,
    tch::Tensor,
};
use approx::assert_relative_eq;
use toy::{Seen, StopAfter, Watched, batch, decoder, numbers, robust, useful, with_lora};

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
    let threat =
        ThreatModel { sites: vec![Site::Block(block)], radius: Radius::Absolute(1.0), ..ThreatModel::default() };
    let inside = Pgd { threat, steps: 3, rule: StepRule::L2, momentum: None, size: StepSize::Constant(1.0) };
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
    let radii: Arc<Mutex<Vec<f64>>> = Arc::default();
    let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
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

/// Notes the prompts that the utility loss meets.
struct WatchedUtility(Arc<Mutex<Vec<Vec<i64>>>>);

impl UtilityLoss for WatchedUtility {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let prompts = input.batch.examples().iter().map(|row| row.prompt().ids().to_vec());
        self.0.lock().unwrap().extend(prompts);
        SupervisedLoss::default().terms(input)
    }
}

#[test]
fn rows_that_are_not_attacked_keep_their_prompts_and_take_no_turn() {
    let (seen, harmless) = (Arc::default(), Arc::default());
    let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
        .attack(by_turns(1), AttackSettings::default())
        .robust(Watched { loss: AdvUlLoss::default(), seen: Arc::clone(&seen) })
        .utility(WatchedUtility(Arc::clone(&harmless)))
        .data(TrainingData { robust: vec![robust(1)], utility: (0..3).map(useful).collect() })
        // One micro-batch of robust rows and three of others in each of four updates.
        .settings(TrainSettings {
            batch_size: 4,
            micro_batch_size: 1,
            utility_share: 0.75,
            epochs: 4,
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    trainer.run(&AtomicBool::new(false)).unwrap();
    let users: Vec<Vec<i64>> = seen.lock().unwrap().iter().map(|(ids, _)| ids[2..ids.len() - 1].to_vec()).collect();
    assert_eq!(users, [[20, 21], [5, 12], [19, 18], [5, 12]]);
    let own: Vec<Vec<i64>> = (0..3).map(|number| useful(number).prompt().ids().to_vec()).collect();
    let harmless = harmless.lock().unwrap();
    assert_eq!(harmless.len(), 12);
    assert!(harmless.iter().all(|prompt| own.contains(prompt)), "{harmless:?}");
}

/// Attacks harmful rows, and then useful ones: from where it may choose its threat set on, or from its search on.
struct ChangesRows {
    threat: ThreatModel,
    in_search: bool,
}

impl EmbeddingAttack for ChangesRows {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn reseed(&mut self, _: &dyn CausalLm, _: &Batch, _: Draws) -> Result<Option<Batch>> {
        if !self.in_search {
            self.threat.rows = ContinuationKind::Utility;
        }
        Ok(None)
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        self.threat.rows = ContinuationKind::Utility;
        Ok(vec![probe.start()?])
    }
}

#[test]
fn an_attack_stays_on_one_kind_of_rows() {
    let (model, rows) = (decoder(), batch(vec![robust(1)]));
    for in_search in [false, true] {
        let mut attack = ChangesRows { threat: ThreatModel::default(), in_search };
        let mut runner = AttackRunner::new(AttackSettings::default(), &attack, &model).unwrap();
        for _ in 0..2 {
            let outcome = runner.run(&mut attack, &mut TargetCrossEntropy, &model, &rows, Draws { seed: 0, epoch: 0 });
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("attack.threat.rows = Utility") && error.contains("Harmful as before"), "{error}");
        }
    }
}
