//! The training loop: what must not change a run, and what must be refused.

#[path = "common/runs.rs"]
mod runs;
#[path = "common/toy.rs"]
mod toy;

use std::sync::{Arc, Mutex};

use advtrain::{
    AdvIpoLoss, AdvUlLoss, AdversarialTrainer, AttackSettings, Batch, CausalLm, ContinuationKind, CutOff, CutOffForm,
    Decoder, EmbeddingAttack, Example, Grouping, LossInput, OptimizerConfig, Perturbation, Pgd, Probe, Radius,
    Reduction, Region, Result, RobustLoss, Schedule, ScheduleShape, Site, StepSize, SupervisedLoss, TargetCrossEntropy,
    Term, TermValues, ThreatModel, TokenKind, Tokens, TrainSettings, TrainableLm, TrainerBuilder, TrainingData,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use rand_distr::StandardNormal;
use runs::{alone, mixed, settings, weights};
use toy::{all_weights, attacked, batch, cross_entropy, numbers, robust, useful, with_lora};

/// A perturbation that is a function of the row alone: of its id, and of how long its prompt is.
struct Given(ThreatModel);

impl EmbeddingAttack for Given {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        Ok(vec![probe.draw(&StandardNormal)?.map(|values| Ok(values * 0.1))?])
    }
}

fn given() -> Given {
    Given(ThreatModel { radius: Radius::Absolute(10.0), ..ThreatModel::default() })
}

/// One update of 64 rows from the same weights, with a cut-off that binds for some of them: what it moved the weights by, the
/// gradient's norm, and the terms with the loss. One step of Adam is of the size of the learning rate whatever the
/// gradient's: a large epsilon makes the step show the gradient itself.
fn one_update(
    robust_loss: impl RobustLoss + 'static,
    reduction: Reduction,
    micro_batch_size: usize,
    grouping: Grouping,
) -> [Vec<f64>; 3] {
    let optimizer = OptimizerConfig { epsilon: 1.0, max_gradient_norm: 0.0, learning_rate: 1.0, ..Default::default() };
    let data = TrainingData { robust: (0..40).map(robust).collect(), utility: (0..24).map(useful).collect() };
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .attack(given(), AttackSettings::default())
        .robust(robust_loss)
        .utility(SupervisedLoss::default())
        .data(data)
        .settings(TrainSettings {
            micro_batch_size,
            reduction,
            utility_share: 0.375,
            schedule: Schedule { warm_up: 0.0, shape: ScheduleShape::Constant },
            optimizer,
            grouping,
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    let moved = weights(trainer.model()).iter().zip(weights(&all_weights())).map(|(a, b)| a - b).collect();
    [moved, vec![metrics.gradient_norm], metrics.terms.values().copied().chain([metrics.loss]).collect()]
}

fn cut_in_the_middle() -> AdvUlLoss {
    let cut_off = |threshold| CutOff { threshold, slope: 0.001, form: CutOffForm::Continuous };
    AdvUlLoss { away_cut_off: cut_off(-3.5), toward_cut_off: cut_off(3.5), ..AdvUlLoss::default() }
}

/// Of each list relative to its largest number.
fn largest_difference(found: &[Vec<f64>; 3], expected: &[Vec<f64>; 3]) -> f64 {
    let of_list = |(found, expected): (&Vec<f64>, &Vec<f64>)| {
        assert!(!expected.is_empty() && found.len() == expected.len());
        assert!(found.iter().chain(expected).all(|one| one.is_finite()), "{found:?}, {expected:?}");
        let largest = expected.iter().fold(0.0f64, |largest, one| largest.max(one.abs()));
        found.iter().zip(expected).map(|(a, b)| (a - b).abs() / largest).fold(0.0, f64::max)
    };
    found.iter().zip(expected).map(of_list).fold(0.0, f64::max)
}

#[test]
fn micro_batches_change_nothing_unless_the_published_reduction_is_asked_for() {
    let _turn = alone();
    type Update = fn(Reduction, usize, Grouping) -> [Vec<f64>; 3];
    let updates: [(&str, Update); 2] = [
        ("C-AdvUL", |reduction, size, grouping| one_update(cut_in_the_middle(), reduction, size, grouping)),
        ("C-AdvIPO", |reduction, size, grouping| {
            one_update(AdvIpoLoss { beta: 0.5, ..Default::default() }, reduction, size, grouping)
        }),
    ];
    for (what, update) in updates {
        let whole = update(Reduction::PerRow, 64, Grouping::ByLength);
        for (size, grouping) in
            [(8, Grouping::ByLength), (1, Grouping::ByLength), (64, Grouping::AsDrawn), (8, Grouping::AsDrawn)]
        {
            let difference = largest_difference(&update(Reduction::PerRow, size, grouping), &whole);
            assert!(difference < 1e-9, "{what}, {size}, {grouping:?}: {difference}");
        }
        let published = update(Reduction::MicroBatch, 64, Grouping::AsDrawn);
        assert!(largest_difference(&update(Reduction::MicroBatch, 8, Grouping::AsDrawn), &published) > 1e-3, "{what}");
    }
}

/// The number in each row's id as its value, with a note of each micro-batch's.
struct NumberOfRow(Arc<Mutex<Vec<Vec<f64>>>>);

impl RobustLoss for NumberOfRow {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let of_rows: Vec<f64> = input.batch.examples().iter().map(|row| row.id()[1..].parse().unwrap()).collect();
        let values =
            TermValues::Rows { values: Tensor::from_slice(&of_rows), kind: ContinuationKind::Harmful, tokens: None };
        self.0.lock().unwrap().push(of_rows);
        Ok(vec![Term { name: "number".into(), weight: 1.0, values, cut_off: None }])
    }
}

#[test]
fn the_published_reduction_divides_by_all_micro_batches_also_by_those_without_rows_of_the_loss() {
    let _turn = alone();
    let noted = Arc::default();
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .robust(NumberOfRow(Arc::clone(&noted)))
        .utility(SupervisedLoss { weight: 0.0, ..SupervisedLoss::default() })
        .data(TrainingData { robust: (0..5).map(robust).collect(), utility: (0..15).map(useful).collect() })
        .settings(TrainSettings {
            batch_size: 20,
            micro_batch_size: 2,
            utility_share: 0.75,
            reduction: Reduction::MicroBatch,
            grouping: Grouping::AsDrawn,
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    let noted = noted.lock().unwrap();
    assert!(noted.len() < metrics.micro_batches && metrics.micro_batches == 10, "{noted:?}");
    let of_means: f64 = noted.iter().map(|of_rows| of_rows.iter().sum::<f64>() / of_rows.len() as f64).sum();
    assert_relative_eq!(metrics.loss, of_means / 10.0, max_relative = 1e-12);
    assert_relative_eq!(metrics.terms["number"], 2.0, max_relative = 1e-12);
}

#[test]
fn an_update_tells_the_tokens_of_its_rows_and_those_of_the_utility_loss() {
    let _turn = alone();
    let data = TrainingData { robust: (0..5).map(robust).collect(), utility: (0..3).map(useful).collect() };
    let tokens = |rows: &[Example]| rows.iter().map(Example::len).sum::<usize>();
    let expected = (tokens(&data.robust) + tokens(&data.utility), tokens(&data.utility));
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .robust(AdvUlLoss::default())
        .utility(SupervisedLoss::default())
        .data(data)
        .settings(TrainSettings {
            batch_size: 8,
            micro_batch_size: 3,
            utility_share: 0.375,
            grouping: Grouping::AsDrawn,
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    assert_eq!((metrics.tokens, metrics.utility_tokens), expected);
}

/// A micro-batch, and the perturbation that its loss was given.
type Attacked = (Vec<Example>, Perturbation);

/// Log p of the harmful answer, with a note of each micro-batch: its rows, and the perturbation that came with them.
struct Noted(Arc<Mutex<Vec<Attacked>>>);

impl RobustLoss for Noted {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let perturbation = input.perturbation.expect("every micro-batch has one");
        self.0.lock().unwrap().push((input.batch.examples().to_vec(), perturbation.snapshot()?));
        let values = -cross_entropy(input.model, input.batch, ContinuationKind::Harmful, Some(perturbation));
        let values = TermValues::Rows { values, kind: ContinuationKind::Harmful, tokens: None };
        Ok(vec![Term { name: "away".into(), weight: 1.0, values, cut_off: None }])
    }
}

#[test]
fn every_micro_batch_trains_on_its_own_perturbation() {
    let _turn = alone();
    let noted = Arc::default();
    let pgd = Pgd { steps: 2, ..Pgd::default() };
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .attack(pgd.clone(), AttackSettings::default())
        .robust(Noted(Arc::clone(&noted)))
        .data(TrainingData { robust: (0..6).map(robust).collect(), utility: Vec::new() })
        .settings(TrainSettings { batch_size: 6, micro_batch_size: 2, ..TrainSettings::default() })
        .build()
        .unwrap();
    let metrics = trainer.step().unwrap();
    let noted = noted.lock().unwrap();
    assert_eq!(noted.len(), 3);
    // By hand from the same weights: attack each pair of rows, sum the gradients.
    let model = all_weights();
    let parameters: Vec<Tensor> = model.parameters().into_iter().map(|one| one.tensor).collect();
    let mut losses = Vec::new();
    let mut clean = Vec::new();
    for (examples, perturbation) in noted.iter() {
        let rows = batch(examples.clone());
        let own =
            attacked(&mut pgd.clone(), &mut TargetCrossEntropy, AttackSettings::default(), &model, &rows).unwrap();
        assert!(own.perturbations[0].parts()[0].1.equal(&perturbation.parts()[0].1));
        let loss = |perturbation| -cross_entropy(&model, &rows, ContinuationKind::Harmful, perturbation) / 6.0;
        losses.push(loss(Some(&own.perturbations[0])));
        clean.push(loss(None));
    }
    let norm = |losses: &[Tensor]| {
        let gradients = Tensor::run_backward(&[Tensor::cat(losses, 0).sum(Kind::Double)], &parameters, true, false);
        gradients.iter().map(|one| numbers(&one.square().sum(Kind::Double))[0]).sum::<f64>().sqrt()
    };
    let by_hand = norm(&losses);
    assert_relative_eq!(metrics.gradient_norm, by_hand, max_relative = 1e-9);
    clean[2] = losses.pop().unwrap();
    assert!((norm(&clean) / by_hand - 1.0).abs() > 1e-3, "the last micro-batch alone would look the same");
}

/// An example's id, and its two reference values.
type ReferenceOf = (String, [f64; 2]);

/// C-AdvIPO, and a note of each example's reference values.
struct WithReference(AdvIpoLoss, Arc<Mutex<Vec<ReferenceOf>>>);

impl RobustLoss for WithReference {
    fn needs(&self) -> &[ContinuationKind] {
        self.0.needs()
    }
    fn precomputes(&self) -> &[&str] {
        self.0.precomputes()
    }
    fn precompute(&self, reference: &dyn CausalLm, batch: &Batch) -> Result<advtrain::Precomputed> {
        self.0.precompute(reference, batch)
    }
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let safe = numbers(&input.batch.values("reference_safe")?);
        let harmful = numbers(&input.batch.values("reference_harmful")?);
        for ((example, safe), harmful) in input.batch.examples().iter().zip(safe).zip(harmful) {
            self.1.lock().unwrap().push((example.id().to_string(), [safe, harmful]));
        }
        self.0.terms(input)
    }
}

/// A model whose adapter is not zero: the original is another one.
fn with_adapter() -> Decoder {
    let model = with_lora(0.0);
    let _guard = advtrain::tch::no_grad_guard();
    for mut one in model.parameters() {
        let _ = one.tensor.f_add_scalar_(0.05).unwrap();
    }
    model
}

#[test]
fn reference_values_belong_to_their_example_whatever_the_order() {
    let _turn = alone();
    let original = toy::decoder();
    let folder = tempfile::tempdir().unwrap();
    let orders: [Vec<usize>; 2] = [(0..8).collect(), vec![5, 2, 7, 0, 1, 6, 3, 4]];
    for (order, folder) in
        [(&orders[0], None), (&orders[1], None), (&orders[1], Some(folder.path())), (&orders[1], Some(folder.path()))]
    {
        let noted = Arc::default();
        let mut builder = AdversarialTrainer::builder(with_adapter())
            .robust(WithReference(AdvIpoLoss::default(), Arc::clone(&noted)))
            .data(TrainingData { robust: order.iter().map(|number| robust(*number)).collect(), utility: Vec::new() })
            .settings(TrainSettings { batch_size: 4, micro_batch_size: 3, epochs: 2, ..TrainSettings::default() });
        if let Some(folder) = folder {
            builder = builder.folder(folder);
        }
        let mut trainer = builder.build().unwrap();
        for _ in 0..trainer.updates_total() {
            trainer.step().unwrap();
        }
        let noted = noted.lock().unwrap();
        assert_eq!(noted.len(), 16);
        for (id, [safe, harmful]) in noted.iter() {
            let rows = batch(vec![robust(id[1..].parse().unwrap())]);
            let log_prob = |kind| -numbers(&cross_entropy(&original, &rows, kind, None))[0];
            assert_relative_eq!(*safe, log_prob(ContinuationKind::Safe), max_relative = 1e-9);
            assert_relative_eq!(*harmful, log_prob(ContinuationKind::Harmful), max_relative = 1e-9);
        }
    }
}

/// Precomputes each row's length, as many times as it is told, and checks what it is given in training.
struct Lengths(fn(&Example) -> usize);

impl Lengths {
    fn of(&self, row: &Example) -> Vec<f64> {
        vec![row.len() as f64; (self.0)(row)]
    }
}

impl RobustLoss for Lengths {
    fn precomputes(&self) -> &[&str] {
        &["lengths"]
    }
    fn precompute(&self, _reference: &dyn CausalLm, batch: &Batch) -> Result<advtrain::Precomputed> {
        Ok(vec![("lengths".into(), batch.examples().iter().map(|row| self.of(row)).collect())])
    }
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let expected: Vec<f64> = input.batch.examples().iter().flat_map(|row| self.of(row)).collect();
        assert_eq!(numbers(&input.batch.values("lengths")?), expected);
        Ok(Vec::new())
    }
}

#[test]
fn numbers_of_the_original_model_are_one_for_a_row_or_one_for_each_of_its_tokens() {
    let _turn = alone();
    let build = |count: fn(&Example) -> usize| {
        AdversarialTrainer::builder(with_adapter())
            .robust(Lengths(count))
            .data(TrainingData { robust: (0..8).map(robust).collect(), utility: Vec::new() })
            .settings(TrainSettings { batch_size: 8, micro_batch_size: 3, ..TrainSettings::default() })
            .build()
    };
    let harmful_targets = |row: &Example| row.continuation(ContinuationKind::Harmful).unwrap().tokens.targets();
    let counts: [fn(&Example) -> usize; 3] = [|_| 1, Example::len, harmful_targets];
    for count in counts {
        build(count).unwrap().step().unwrap();
    }
    let wrong: [fn(&Example) -> usize; 3] = [|_| 2, |row| row.len() + 1, |_| 0];
    for count in wrong {
        let error = build(count).err().unwrap().to_string();
        assert!(error.contains("precomputed lengths of example r") && error.contains("for the row"), "{error}");
    }
}

#[test]
fn an_attack_leaves_gradients_and_flags_of_weights_alone() {
    let _turn = alone();
    let rows = batch((0..3).map(robust).collect());
    for (model, dropout) in [(all_weights(), false), (with_lora(0.3), false), (with_lora(0.3), true)] {
        let around = AttackSettings { dropout, ..AttackSettings::default() };
        let attack = || {
            attacked(&mut Pgd::default(), &mut TargetCrossEntropy, around.clone(), &model, &rows).unwrap();
        };
        attack();
        for one in model.parameters() {
            assert!(!one.tensor.grad().defined() && one.tensor.requires_grad(), "{}", one.name);
        }
        assert_eq!(model.embedding().requires_grad(), !model.has_adapter());
        cross_entropy(&model, &rows, ContinuationKind::Harmful, None).sum(Kind::Double).backward();
        let gradients =
            || -> Vec<f64> { model.parameters().iter().flat_map(|one| numbers(&one.tensor.grad())).collect() };
        let before = gradients();
        assert!(before.iter().any(|one| *one != 0.0));
        attack();
        assert!(gradients() == before);
    }
}

#[test]
fn the_share_of_tokens_at_the_edge_is_reported() {
    let _turn = alone();
    /// Puts the tokens of a prompt at 1, 0.5, 1, 0.5, … of the radius.
    struct Alternating(ThreatModel);
    impl EmbeddingAttack for Alternating {
        fn threat(&self) -> &ThreatModel {
            &self.0
        }
        fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
            let sizes: Vec<f64> =
                probe.places().iter().map(|one| [1.0, 0.5][one.offset % 2] * probe.radius()).collect();
            let direction = probe.draw(&StandardNormal)?;
            let sizes = Tensor::from_slice(&sizes).unsqueeze(1); // [places, 1]
            Ok(vec![direction.map(|one| Ok(one / one.norm_scalaropt_dim(2, [1], true) * &sizes))?])
        }
    }
    let examples: Vec<Example> = (0..4).map(robust).collect();
    let lengths = examples.iter().map(|one| one.prompt().len());
    let (edge, all) = (lengths.clone().map(|len| len.div_ceil(2)).sum::<usize>() as f64, lengths.sum::<usize>() as f64);
    let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
        .attack(Alternating(ThreatModel::default()), AttackSettings::default())
        .robust(AdvUlLoss::default())
        .data(TrainingData { robust: examples, utility: Vec::new() })
        .settings(TrainSettings { batch_size: 4, micro_batch_size: 3, ..TrainSettings::default() })
        .build()
        .unwrap();
    let attack = trainer.step().unwrap().attack.unwrap();
    assert_relative_eq!(attack.edge_share, edge / all, max_relative = 1e-12);
    assert_relative_eq!(attack.mean_size, (edge + 0.5 * (all - edge)) / all, max_relative = 1e-9);
    let norms: Vec<f64> = numbers(&with_lora(0.0).embedding().norm_scalaropt_dim(2, [1], false));
    assert_relative_eq!(attack.radius, 0.1 * norms.iter().sum::<f64>() / norms.len() as f64, max_relative = 1e-12);
}

#[test]
fn bad_set_ups_say_what_is_wrong() {
    let _turn = alone();
    let base = |model| {
        AdversarialTrainer::builder(model)
            .robust(AdvUlLoss::default())
            .data(mixed())
            .settings(TrainSettings { utility_share: 0.0, ..settings() })
    };
    let good = || base(with_lora(0.0));
    let robust_rows = |robust: Vec<Example>| TrainingData { robust, utility: Vec::new() };
    let half = {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 1, "num_attention_heads": 2
        });
        let mut model = Decoder::random(json, 0.5, 3, Kind::Half, Device::Cpu).unwrap();
        model.add_lora(&advtrain::LoraConfig { rank: 2, ..Default::default() }, 5).unwrap();
        model
    };
    let latent = |sites| Pgd {
        threat: ThreatModel { sites, radius: Radius::Absolute(1.0), ..ThreatModel::default() },
        ..Pgd::default()
    };
    let attacking = |rows| Pgd {
        threat: ThreatModel { rows, region: Region::UserContent, ..ThreatModel::default() },
        ..Pgd::default()
    };
    let template_alone = Tokens::of_kind(vec![1, 2, 3], TokenKind::Template);
    assert!(good().build().is_ok());
    let cases: Vec<(TrainerBuilder<Decoder>, &[&str])> = vec![
        (good().data(robust_rows(Vec::new())), &["train.utility_share", "without robust rows"]),
        (
            AdversarialTrainer::builder(with_lora(0.0)).data(mixed()).settings(settings()),
            &["train.utility_share", "without a robust loss"],
        ),
        (good().settings(settings()), &["train.utility_share", "without a utility loss"]),
        (good().data(robust_rows(vec![robust(1), robust(2), robust(1)])), &["r1", "same id"]),
        (
            good().data(robust_rows(vec![robust(1), robust(2).keep(&[ContinuationKind::Harmful])])),
            &["r2", "Safe continuation"],
        ),
        (base(half), &["dtype", "float16"]),
        (base(toy::decoder()), &["model to train"]),
        (
            good().settings(TrainSettings { micro_batch_size: 0, utility_share: 0.0, ..settings() }),
            &["train.micro_batch_size = 0", "at least 1"],
        ),
        (
            good().attack(Pgd::default(), AttackSettings { restarts: 3, ..AttackSettings::default() }),
            &["attack_settings.restarts = 3"],
        ),
        (
            good().attack(latent(vec![Site::Block(9)]), AttackSettings::default()),
            &["attack.threat.sites = Block(9)", "a block below 2"],
        ),
        (
            good().attack(latent(vec![Site::Block(1), Site::Block(1)]), AttackSettings::default()),
            &["attack.threat.sites = Block(1) twice"],
        ),
        (
            good()
                .attack(attacking(ContinuationKind::Safe), AttackSettings::default())
                .robust(HarmfulAlone)
                .data(robust_rows(vec![robust(1).keep(&[ContinuationKind::Harmful])])),
            &["attack.threat.rows = Safe", "that the rows have"],
        ),
        (
            good()
                .attack(attacking(ContinuationKind::Harmful), AttackSettings::default())
                .data(robust_rows(vec![robust(1), robust(2).with_prompt(template_alone).unwrap()])),
            &["r2", "UserContent"],
        ),
        (good().robust(Forgets), &["precomputed numbers of example r0", "{\"reference\"}", "{}"]),
    ];
    for (builder, expected) in cases {
        let error = match builder.build() {
            Ok(_) => panic!("accepted, though it should say {expected:?}"),
            Err(error) => error.to_string(),
        };
        for part in expected {
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
    }
}

/// A loss on harmful answers that has no need of safe ones.
struct HarmfulAlone;

impl RobustLoss for HarmfulAlone {
    fn terms(&self, _: &LossInput) -> Result<Vec<Term>> {
        Ok(Vec::new())
    }
}

/// A loss that says it computes something beforehand, and does not.
struct Forgets;

impl RobustLoss for Forgets {
    fn precomputes(&self) -> &[&str] {
        &["reference"]
    }
    fn terms(&self, _: &LossInput) -> Result<Vec<Term>> {
        Ok(Vec::new())
    }
}

/// A loss with a term of these values and this kind.
struct Wrong(i64, ContinuationKind);

impl RobustLoss for Wrong {
    fn terms(&self, _: &LossInput) -> Result<Vec<Term>> {
        let values = Tensor::ones([self.0], (Kind::Double, Device::Cpu));
        let values = TermValues::Rows { values, kind: self.1, tokens: None };
        Ok(vec![Term { name: "wrong".into(), weight: 1.0, values, cut_off: None }])
    }
}

#[test]
fn a_term_without_one_value_per_row_is_refused() {
    let _turn = alone();
    let step = |loss| {
        let mut trainer = AdversarialTrainer::builder(with_lora(0.0))
            .robust(loss)
            .data(TrainingData { robust: (0..4).map(robust).collect(), utility: Vec::new() })
            .settings(TrainSettings { batch_size: 4, micro_batch_size: 2, ..TrainSettings::default() })
            .build()
            .unwrap();
        trainer.step().map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(step(Wrong(2, ContinuationKind::Harmful)), Ok(()));
    for values in [0, 1, 7] {
        let error = step(Wrong(values, ContinuationKind::Harmful)).unwrap_err();
        assert!(error.contains("term \"wrong\": expected [2], one for each row"), "{error}");
    }
    let error = step(Wrong(2, ContinuationKind::Utility)).unwrap_err();
    assert!(error.contains("kind of the term \"wrong\"") && error.contains("found Utility"), "{error}");
}

#[test]
fn steps_that_cannot_reach_the_edge_of_the_ball_are_warned_about() {
    let _turn = alone();
    let warnings = |size, bounded| {
        let log = tempfile::NamedTempFile::new().unwrap();
        let writer = Arc::new(log.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
        let attack = Pgd { size, threat: ThreatModel { bounded, ..ThreatModel::default() }, ..Pgd::default() };
        tracing::subscriber::with_default(subscriber, || {
            AdversarialTrainer::builder(with_lora(0.0))
                .attack(attack, AttackSettings::default())
                .robust(AdvUlLoss::default())
                .data(TrainingData { robust: vec![robust(1)], utility: Vec::new() })
                .settings(TrainSettings { batch_size: 1, ..TrainSettings::default() })
                .build()
                .unwrap()
        });
        std::fs::read_to_string(log.path()).unwrap().matches("cannot reach the edge of the ball").count()
    };
    assert_eq!(warnings(StepSize::Absolute(1e-4), true), 1);
    assert_eq!(warnings(StepSize::Absolute(1e-4), false), 0);
    assert_eq!(warnings(StepSize::Decaying(1.0), true), 0);
}

/// A loss that is fine for the first rows and not a number for the rest.
struct Broken(Mutex<usize>);

impl RobustLoss for Broken {
    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let mut calls = self.0.lock().unwrap();
        *calls += 1;
        let factor = if *calls > 3 { f64::NAN } else { 1.0 };
        let values = cross_entropy(input.model, input.batch, ContinuationKind::Harmful, None) * factor;
        let values = TermValues::Rows { values, kind: ContinuationKind::Harmful, tokens: None };
        Ok(vec![Term { name: "broken".into(), weight: 1.0, values, cut_off: None }])
    }
}

#[test]
fn a_loss_that_is_no_number_leaves_the_weights_as_they_were() {
    let _turn = alone();
    let mut trainer = AdversarialTrainer::builder(all_weights())
        .robust(Broken(Mutex::new(0)))
        .data(TrainingData { robust: (0..4).map(robust).collect(), utility: Vec::new() })
        .settings(TrainSettings { batch_size: 4, micro_batch_size: 2, ..TrainSettings::default() })
        .build()
        .unwrap();
    trainer.step().unwrap();
    let before = weights(trainer.model());
    let error = trainer.step().unwrap_err().to_string();
    assert!(error.contains("update 2, micro-batch 2") && error.contains("loss"), "{error}");
    assert!(weights(trainer.model()) == before);
    assert_eq!(trainer.updates_done(), 1);
}
