//! Attacks against formulas: steps, gradients, projections, starts, and what the framework promises around them.

#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    AttackOutcome, AttackRunner, AttackSettings, Batch, CausalLm, ContinuationKind, Decoder, Draws, EmbeddingAttack,
    Input, Iterate, Momentum, Norm, Pass, Perturbation, Pgd, Place, Probe, Radius, Region, Result, Site, Start,
    StepRule, StepSize, TargetCrossEntropy, ThreatModel, TokenKind,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use rand_distr::StandardNormal;
use toy::{Bigram, HIDDEN, VOCABULARY, adapted, attacked, batch, cross_entropy, decoder, numbers, robust};

const RADIUS: f64 = 0.6;

fn threat() -> ThreatModel {
    ThreatModel { radius: Radius::Absolute(RADIUS), ..ThreatModel::default() }
}

fn run(
    attack: &mut dyn EmbeddingAttack,
    settings: &AttackSettings,
    model: &dyn CausalLm,
    rows: &Batch,
) -> AttackOutcome {
    attacked(attack, &mut TargetCrossEntropy, settings.clone(), model, rows).unwrap()
}

fn values(perturbation: &Perturbation) -> &Tensor {
    &perturbation.parts()[0].1
}

/// The norm of each token's vector.
fn sizes(perturbation: &Perturbation) -> Vec<f64> {
    numbers(&values(perturbation).norm_scalaropt_dim(2, [1], false))
}

/// The values of one row.
fn row(perturbation: &Perturbation, row: usize) -> Vec<f64> {
    numbers(values(&perturbation.restrict(&[row]).unwrap()))
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|one| one * one).sum::<f64>().sqrt()
}

fn harmful_loss(model: &dyn CausalLm, rows: &Batch, perturbation: &Perturbation) -> Vec<f64> {
    numbers(&cross_entropy(model, rows, ContinuationKind::Harmful, Some(perturbation)))
}

/// One row of a bigram model: only the prompt's last token matters, and its gradient is a formula.
struct Hand {
    table: Vec<f64>,
    head: Vec<f64>,
    last: usize,
    target: usize,
    targets: f64,
}

impl Hand {
    fn new(model: &Bigram, rows: &Batch) -> Self {
        let example = &rows.examples()[0];
        let harmful = &example.continuation(ContinuationKind::Harmful).unwrap().tokens;
        Self {
            table: numbers(&model.embedding),
            head: numbers(&model.head),
            last: *example.prompt().ids().last().unwrap() as usize,
            target: harmful.ids()[0] as usize,
            targets: harmful.len() as f64,
        }
    }

    /// (sum over v of p(v) W(v) - W(target)) / targets, at the embedding plus `d`.
    fn gradient(&self, d: &[f64]) -> Vec<f64> {
        let width = HIDDEN as usize;
        let x: Vec<f64> = self.table[self.last * width..][..width].iter().zip(d).map(|(e, d)| e + d).collect();
        let logits = self.head.chunks(width).map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>());
        let weights: Vec<f64> = logits.map(f64::exp).collect();
        let total: f64 = weights.iter().sum();
        let mean = |at: usize| -> f64 {
            weights.iter().zip(self.head.chunks(width)).map(|(weight, w)| weight / total * w[at]).sum()
        };
        (0..width).map(|at| (mean(at) - self.head[self.target * width + at]) / self.targets).collect()
    }

    /// d after steps of these lengths along a direction that depends on the gradient and the step.
    fn descend(&self, lengths: &[f64], direction: impl FnMut(Vec<f64>, i32) -> Vec<f64>) -> Vec<f64> {
        self.descend_in(Norm::L2, lengths, direction)
    }

    fn descend_in(
        &self,
        ball: Norm,
        lengths: &[f64],
        mut direction: impl FnMut(Vec<f64>, i32) -> Vec<f64>,
    ) -> Vec<f64> {
        let mut d = vec![0.0; HIDDEN as usize];
        for (step, length) in lengths.iter().enumerate() {
            let along = direction(self.gradient(&d), step as i32 + 1);
            d.iter_mut().zip(along).for_each(|(d, along)| *d -= length * along);
            // No other token of the row moves.
            let shrink = if ball == Norm::Linf { 1.0 } else { (RADIUS / norm(&d)).min(1.0) };
            d.iter_mut().for_each(|d| *d = (*d * shrink).clamp(-RADIUS, RADIUS));
        }
        d
    }
}

fn unit(vector: Vec<f64>) -> Vec<f64> {
    let size = norm(&vector);
    vector.into_iter().map(|one| one / size).collect()
}

fn signs(vector: Vec<f64>) -> Vec<f64> {
    vector.into_iter().map(f64::signum).collect()
}

fn add_unit(sum: &mut [f64], decay: f64, gradient: Vec<f64>) -> Vec<f64> {
    sum.iter_mut().zip(unit(gradient)).for_each(|(sum, one)| *sum = decay * *sum + one);
    sum.to_vec()
}

fn largest(vector: &[f64]) -> f64 {
    vector.iter().fold(0.0, |largest, one| largest.max(one.abs()))
}

/// Adam's direction with decays of 0.8 and 0.95 and an epsilon of 1e-3.
#[derive(Default)]
struct HandAdam {
    mean: [f64; HIDDEN as usize],
    square: [f64; HIDDEN as usize],
}

const ADAM: StepRule = StepRule::Adam { beta1: 0.8, beta2: 0.95, epsilon: 1e-3 };

impl HandAdam {
    fn direction(&mut self, gradient: Vec<f64>, step: i32) -> Vec<f64> {
        let moments = self.mean.iter_mut().zip(&mut self.square).zip(gradient);
        let along = moments.map(|((mean, square), g)| {
            *mean = 0.8 * *mean + 0.2 * g;
            *square = 0.95 * *square + 0.05 * g * g;
            (*mean / (1.0 - 0.8f64.powi(step))) / ((*square / (1.0 - 0.95f64.powi(step))).sqrt() + 1e-3)
        });
        along.collect()
    }
}

/// The last token of a row of a bigram model after the attack; the others must not have moved.
fn last_token(attack: &mut Pgd, model: &Bigram, rows: &Batch) -> Vec<f64> {
    let what = format!("{attack:?}");
    let found = run(attack, &AttackSettings::default(), model, rows);
    let found = numbers(values(&found.perturbations[0]));
    let (others, last) = found.split_at(found.len() - HIDDEN as usize);
    assert!(others.iter().all(|one| *one == 0.0), "{what}: a token without gradient moved");
    last.to_vec()
}

fn assert_near(what: &str, found: &[f64], expected: &[f64]) {
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-12, "{what}: {found} instead of {expected}");
    }
}

#[test]
fn every_step_rule_is_its_formula() {
    let (model, rows) = (Bigram::new(), batch(vec![robust(3)]));
    let hand = Hand::new(&model, &rows);
    let coordinate = RADIUS / (HIDDEN as f64).sqrt();
    let zero = || vec![0.0; HIDDEN as usize];
    let decaying = |size: f64| (0..4).map(|step| size * (1.0 - f64::from(step) / 4.0)).collect::<Vec<_>>();
    let (mut sum, mut sign_sum, mut adam) = (zero(), zero(), HandAdam::default());
    let half = Some(Momentum { decay: 0.5 });
    for (rule, momentum, size, expected) in [
        (StepRule::Sign, None, StepSize::Absolute(0.05), hand.descend(&[0.05; 4], |g, _| signs(g))),
        (StepRule::Sign, None, StepSize::Constant(0.9), hand.descend(&[0.9 * coordinate; 4], |g, _| signs(g))),
        (StepRule::Sign, None, StepSize::Decaying(0.7), hand.descend(&decaying(0.7 * coordinate), |g, _| signs(g))),
        (StepRule::L2, None, StepSize::Absolute(0.1), hand.descend(&[0.1; 4], |g, _| unit(g))),
        (StepRule::L2, None, StepSize::Constant(0.5), hand.descend(&[0.5 * RADIUS; 4], |g, _| unit(g))),
        (StepRule::L2, None, StepSize::Decaying(1.0), hand.descend(&decaying(RADIUS), |g, _| unit(g))),
        (
            StepRule::L2,
            half,
            StepSize::Constant(0.3),
            hand.descend(&[0.3 * RADIUS; 4], |g, _| unit(add_unit(&mut sum, 0.5, g))),
        ),
        (
            StepRule::Sign,
            half,
            StepSize::Constant(0.3),
            hand.descend(&[0.3 * coordinate; 4], |g, _| signs(add_unit(&mut sign_sum, 0.5, g))),
        ),
        (ADAM, None, StepSize::Constant(0.3), hand.descend(&[0.3 * coordinate; 4], |g, step| adam.direction(g, step))),
    ] {
        let mut attack = Pgd { threat: threat(), steps: 4, rule, momentum, size };
        let found = last_token(&mut attack, &model, &rows);
        assert_near(&format!("{rule:?}, {momentum:?}, {size:?}"), &found, &expected);
    }
}

#[test]
fn a_relative_step_is_a_share_of_the_radius_in_every_norm() {
    let (model, rows) = (Bigram::new(), batch(vec![robust(3)]));
    let hand = Hand::new(&model, &rows);
    // What each number moves by where the numbers of all tokens of the row share the radius.
    let shared = RADIUS / ((rows.examples()[0].prompt().len() as i64 * HIDDEN) as f64).sqrt();
    let by_largest = |g: Vec<f64>| g.iter().map(|one| one / largest(&g)).collect::<Vec<_>>();
    let mut sum = vec![0.0; HIDDEN as usize];
    let summed = |g: Vec<f64>, _| {
        sum.iter_mut().zip(by_largest(g)).for_each(|(sum, one)| *sum = 0.5 * *sum + one);
        by_largest(sum.clone())
    };
    let (mut in_largest, mut in_row) = (HandAdam::default(), HandAdam::default());
    let share = StepSize::Constant(0.3);
    let (sign, absolute) = (StepRule::Sign, StepSize::Absolute(0.05));
    for (norm, rule, decay, size, expected) in [
        (Norm::Linf, sign, None, share, hand.descend_in(Norm::Linf, &[0.3 * RADIUS; 4], |g, _| signs(g))),
        (Norm::Linf, sign, None, absolute, hand.descend_in(Norm::Linf, &[0.05; 4], |g, _| signs(g))),
        (Norm::Linf, StepRule::L2, None, share, hand.descend_in(Norm::Linf, &[0.3 * RADIUS; 4], |g, _| by_largest(g))),
        (Norm::Linf, StepRule::L2, Some(0.5), share, hand.descend_in(Norm::Linf, &[0.3 * RADIUS; 4], summed)),
        (
            Norm::Linf,
            ADAM,
            None,
            share,
            hand.descend_in(Norm::Linf, &[0.3 * RADIUS; 4], |g, step| in_largest.direction(g, step)),
        ),
        (Norm::RowL2, sign, None, share, hand.descend_in(Norm::RowL2, &[0.3 * shared; 4], |g, _| signs(g))),
        (Norm::RowL2, sign, None, absolute, hand.descend_in(Norm::RowL2, &[0.05; 4], |g, _| signs(g))),
        (Norm::RowL2, StepRule::L2, None, share, hand.descend_in(Norm::RowL2, &[0.3 * RADIUS; 4], |g, _| unit(g))),
        (
            Norm::RowL2,
            ADAM,
            None,
            share,
            hand.descend_in(Norm::RowL2, &[0.3 * shared; 4], |g, step| in_row.direction(g, step)),
        ),
    ] {
        let momentum = decay.map(|decay| Momentum { decay });
        let mut attack = Pgd { threat: ThreatModel { norm, ..threat() }, steps: 4, rule, momentum, size };
        let found = last_token(&mut attack, &model, &rows);
        assert_near(&format!("{norm:?}, {rule:?}, {decay:?}, {size:?}"), &found, &expected);
        assert!(largest(&found) > 0.01, "{norm:?}, {rule:?}");
    }
}

#[test]
fn in_the_norm_of_a_row_the_step_is_the_rows() {
    let (model, rows) = (decoder(), batch((0..4).map(robust).collect()));
    let threat = ThreatModel { norm: Norm::RowL2, ..threat() };
    let once = |rule| {
        let mut attack = Pgd { threat: threat.clone(), steps: 1, rule, momentum: None, size: StepSize::Constant(0.5) };
        run(&mut attack, &AttackSettings::default(), &model, &rows).perturbations.remove(0)
    };
    let (moved, signs) = (once(StepRule::L2), once(StepRule::Sign));
    // The gradient by a backward pass of the test's own.
    let zero = values(&moved).zeros_like().set_requires_grad(true);
    let leaf = Perturbation::new(moved.places().to_vec(), vec![(Site::Embeddings, zero.shallow_clone())]).unwrap();
    let loss = cross_entropy(&model, &rows, ContinuationKind::Harmful, Some(&leaf)).sum(Kind::Double);
    let gradient = Tensor::run_backward(&[loss], &[zero], false, false).remove(0);
    let gradient = Perturbation::new(moved.places().to_vec(), vec![(Site::Embeddings, gradient)]).unwrap();
    for number in 0..4 {
        let gradient = row(&gradient, number);
        let expected: Vec<f64> = gradient.iter().map(|g| -0.5 * RADIUS * g / norm(&gradient)).collect();
        assert_near("L2", &row(&moved, number), &expected);
        let expected: Vec<f64> =
            gradient.iter().map(|g| -0.5 * RADIUS * g.signum() / (gradient.len() as f64).sqrt()).collect();
        assert_near("sign", &row(&signs, number), &expected);
    }
}

#[test]
fn the_reach_is_how_far_the_steps_go_in_the_norm() {
    let of = |norm, rule, size| {
        let attack = Pgd { threat: ThreatModel { norm, ..threat() }, steps: 4, rule, momentum: None, size };
        attack.reach(HIDDEN, RADIUS)
    };
    let (share, absolute) = (StepSize::Decaying(0.4), StepSize::Absolute(0.01));
    // 1 + 3/4 + 2/4 + 1/4 steps of 0.4 radii.
    let relative = 2.5 * 0.4 * RADIUS;
    for (norm, rule, size, expected) in [
        (Norm::L2, StepRule::Sign, share, Some(relative)),
        (Norm::L2, StepRule::L2, share, Some(relative)),
        (Norm::L2, StepRule::Sign, absolute, Some(0.04 * (HIDDEN as f64).sqrt())),
        (Norm::L2, StepRule::L2, absolute, Some(0.04)),
        (Norm::Linf, StepRule::Sign, share, Some(relative)),
        (Norm::Linf, StepRule::L2, share, Some(relative)),
        (Norm::Linf, StepRule::Sign, absolute, Some(0.04)),
        (Norm::RowL2, StepRule::Sign, share, Some(relative)),
        (Norm::RowL2, StepRule::L2, share, Some(relative)),
        (Norm::RowL2, StepRule::Sign, absolute, None),
        (Norm::RowL2, StepRule::L2, absolute, Some(0.04)),
    ] {
        let found = of(norm, rule, size);
        let what = format!("{norm:?}, {rule:?}, {size:?}: {found:?} instead of {expected:?}");
        assert_eq!(found.is_some(), expected.is_some(), "{what}");
        assert!((found.unwrap_or(0.0) - expected.unwrap_or(0.0)).abs() < 1e-12, "{what}");
    }
}

/// Compares the probe's gradient with central differences of its value, and returns nothing.
struct Differences {
    threat: ThreatModel,
    compared: usize,
}

impl EmbeddingAttack for Differences {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let at = probe.draw(&StandardNormal)?.map(|values| Ok(values * 0.1))?;
        let gradient = probe.gradient(&at)?.gradient;
        for site in 0..at.parts().len() {
            for place in 0..at.places().len() as i64 {
                let coordinate = [place, (3 * place + 1) % HIDDEN];
                let mut shifted = |step: f64| -> Result<f64> {
                    let moved = at.snapshot()?;
                    let values = &moved.parts()[site].1;
                    let _ = values.get(coordinate[0]).get(coordinate[1]).f_add_scalar_(step)?;
                    Ok(numbers(&probe.value(&moved)?).iter().sum())
                };
                let slope = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
                let found = gradient.parts()[site].1.double_value(&coordinate);
                assert!((found - slope).abs() < 1e-7 * (1.0 + slope.abs()), "site {site}: {found}, {slope}");
                self.compared += usize::from(slope.abs() > 1e-4);
            }
        }
        Ok(vec![probe.zero()?])
    }
}

#[test]
fn the_gradient_is_the_slope_at_every_site() {
    let sites = vec![Site::Embeddings, Site::Block(0), Site::Block(1)];
    let threat = ThreatModel { sites, bounded: false, ..threat() };
    let mut attack = Differences { threat, compared: 0 };
    let rows = batch((0..3).map(robust).collect());
    run(&mut attack, &AttackSettings::default(), &decoder(), &rows);
    assert!(attack.compared > 30, "{} slopes were not zero", attack.compared);
}

#[test]
fn projection_is_the_nearest_point_of_the_ball() {
    let places = [(0, 0), (0, 1), (1, 0)].map(|(row, offset)| Place { row, offset }).to_vec();
    let of = |values: &[f64]| {
        Perturbation::new(places.clone(), vec![(Site::Embeddings, Tensor::from_slice(values).view([3, 2]))]).unwrap()
    };
    let point = of(&[3.0, 4.0, 0.3, -0.4, 0.0, -2.5]);
    let row = 25.25f64.sqrt();
    for (norm, radius, expected) in [
        (Norm::L2, 1.0, [0.6, 0.8, 0.3, -0.4, 0.0, -1.0]),
        (Norm::Linf, 1.0, [1.0, 1.0, 0.3, -0.4, 0.0, -1.0]),
        (Norm::RowL2, 1.0, [3.0 / row, 4.0 / row, 0.3 / row, -0.4 / row, 0.0, -1.0]),
        (Norm::RowL2, 3.0, [9.0 / row, 12.0 / row, 0.9 / row, -1.2 / row, 0.0, -2.5]),
        (Norm::L2, 9.0, [3.0, 4.0, 0.3, -0.4, 0.0, -2.5]),
    ] {
        let projected = ThreatModel { norm, ..threat() }.project(&point, radius).unwrap();
        for (found, expected) in numbers(values(&projected)).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{norm:?}, {radius}: {found} instead of {expected}");
        }
    }
    let zero = ThreatModel::default().project(&of(&[0.0; 6]), 1.0).unwrap();
    assert_eq!(numbers(values(&zero)), [0.0; 6]);
}

/// Returns where it was told to start, `factor` times as long.
struct Starts {
    threat: ThreatModel,
    factor: f64,
}

impl EmbeddingAttack for Starts {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        Ok(vec![probe.start()?.map(|values| Ok(values * self.factor))?])
    }
}

fn starts(start: Start, numbers: &[usize], draws: Draws) -> Perturbation {
    let mut attack = Starts { threat: threat(), factor: 1.0 };
    let settings = AttackSettings { start, ..AttackSettings::default() };
    let (model, rows) = (Bigram::new(), batch(numbers.iter().map(|number| robust(*number)).collect()));
    let mut runner = AttackRunner::new(settings, &attack, &model).unwrap();
    runner.run(&mut attack, &mut TargetCrossEntropy, &model, &rows, draws).unwrap().perturbations.remove(0)
}

#[test]
fn random_starts_are_spread_over_the_ball_and_belong_to_the_row() {
    let draws = Draws { seed: 1, epoch: 0 };
    let many: Vec<usize> = (0..60).collect();
    // Uniform in a ball of d dimensions: the d-th power of the length is uniform from 0 to 1.
    let shares: Vec<f64> = sizes(&starts(Start::Uniform, &many, draws)).iter().map(|one| one / RADIUS).collect();
    assert!(shares.iter().all(|share| *share <= 1.0 + 1e-12));
    let mean = shares.iter().map(|share| share.powi(HIDDEN as i32)).sum::<f64>() / shares.len() as f64;
    assert!((mean - 0.5).abs() < 4.0 * (12.0 * shares.len() as f64).sqrt().recip(), "{mean}");
    for start in [Start::Uniform, Start::Gaussian] {
        let together = starts(start, &[0, 1, 2], draws);
        assert_eq!(row(&together, 1), row(&starts(start, &[4, 0, 1], draws), 2));
        assert_ne!(row(&together, 0), row(&together, 1)[..row(&together, 0).len()]);
        for other in [Draws { epoch: 1, ..draws }, Draws { seed: 2, ..draws }] {
            assert_ne!(row(&together, 1), row(&starts(start, &[0, 1, 2], other), 1));
        }
    }
    assert!(sizes(&starts(Start::Zero, &[0, 1], draws)).iter().all(|size| *size == 0.0));
}

#[test]
fn what_lies_outside_the_ball_is_projected() {
    let settings = AttackSettings { start: Start::Gaussian, ..AttackSettings::default() };
    let rows = batch((0..3).map(robust).collect());
    let run = |bounded| {
        let mut attack = Starts { threat: ThreatModel { bounded, ..threat() }, factor: 100.0 };
        run(&mut attack, &settings, &Bigram::new(), &rows)
    };
    let inside = run(true);
    for size in sizes(&inside.perturbations[0]) {
        assert_relative_eq!(size, RADIUS, max_relative = 1e-12);
    }
    assert_eq!(inside.statistics.tokens_at_edge, inside.statistics.tokens);
    let outside = run(false);
    assert!(sizes(&outside.perturbations[0]).iter().all(|size| *size > 10.0 * RADIUS));
    assert_eq!(outside.statistics.tokens_at_edge, outside.statistics.tokens, "beyond the edge counts as at it");
}

fn steps(size: StepSize) -> Pgd {
    Pgd { threat: threat(), steps: 5, rule: StepRule::L2, momentum: None, size }
}

/// The first losses are nowhere above the second, and somewhere below.
fn assert_never_worse(better: &[f64], worse: &[f64]) {
    assert!(better.iter().zip(worse).all(|(better, worse)| *better <= worse + 1e-12), "{better:?}, {worse:?}");
    assert!(better.iter().zip(worse).any(|(better, worse)| *better < worse - 1e-6), "{better:?}, {worse:?}");
}

#[test]
fn restarts_and_the_best_iterate_never_make_it_worse() {
    let (model, rows) = (decoder(), batch((0..6).map(robust).collect()));
    // Steps too long to settle: the last iterate is seldom the best.
    let losses = |restarts, iterate| {
        let settings = AttackSettings { start: Start::Uniform, restarts, iterate, ..AttackSettings::default() };
        let outcome = run(&mut steps(StepSize::Constant(1.5)), &settings, &model, &rows);
        let losses = harmful_loss(&model, &rows, &outcome.perturbations[0]);
        (losses, outcome.statistics)
    };
    let (one, _) = losses(1, Iterate::Last);
    let (four, statistics) = losses(4, Iterate::Last);
    let (best, _) = losses(1, Iterate::Best);
    assert_never_worse(&four, &one);
    assert_never_worse(&best, &one);
    assert_relative_eq!(statistics.objective_last, four.iter().sum::<f64>(), max_relative = 1e-9);
    // Five steps, and one pass to compare what they ended with, four times.
    assert_eq!((statistics.forward_passes, statistics.backward_passes), (24, 20));
}

#[test]
fn a_warm_start_begins_where_the_rows_last_attack_ended() {
    let (model, mut attack) = (decoder(), steps(StepSize::Constant(0.3)));
    let settings = AttackSettings { warm_start: true, ..AttackSettings::default() };
    let mut runner = AttackRunner::new(settings, &attack, &model).unwrap();
    let mut run = |attack: &mut dyn EmbeddingAttack, rows: &[usize], epoch| {
        let rows = batch(rows.iter().map(|number| robust(*number)).collect());
        let outcome = runner.run(attack, &mut TargetCrossEntropy, &model, &rows, Draws { seed: 0, epoch });
        outcome.unwrap().perturbations.remove(0)
    };
    let ended = run(&mut attack, &[0, 1, 2], 0);
    let begun = run(&mut Starts { threat: threat(), factor: 1.0 }, &[4, 2, 0], 1);
    assert!(row(&begun, 0).iter().all(|one| *one == 0.0), "a row that was never attacked starts at zero");
    assert_eq!(row(&begun, 1), row(&ended, 2));
    assert_eq!(row(&begun, 2), row(&ended, 0));
    assert!(row(&ended, 0).iter().any(|one| *one != 0.0));
}

/// Returns perturbations of the first token of each row and of nothing else, `sizes` long.
struct FirstTokens {
    threat: ThreatModel,
    sizes: Vec<f64>,
}

impl EmbeddingAttack for FirstTokens {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let places: Vec<Place> = probe.places().iter().filter(|place| place.offset == 0).copied().collect();
        let unit = Tensor::ones([places.len() as i64, HIDDEN], (Kind::Double, Device::Cpu)) / (HIDDEN as f64).sqrt();
        let of = |size: &f64| Perturbation::new(places.clone(), vec![(Site::Embeddings, &unit * *size)]);
        self.sizes.iter().map(of).collect()
    }
}

#[test]
fn a_warm_start_keeps_the_last_of_several_perturbations_where_it_perturbed() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let settings = AttackSettings { warm_start: true, ..AttackSettings::default() };
    let mut runner = AttackRunner::new(settings, &Pgd { threat: threat(), ..Pgd::default() }, &model).unwrap();
    let mut run = |attack: &mut dyn EmbeddingAttack| {
        let draws = Draws { seed: 0, epoch: 0 };
        runner.run(attack, &mut TargetCrossEntropy, &model, &rows, draws).unwrap().perturbations
    };
    let ended = run(&mut FirstTokens { threat: threat(), sizes: vec![0.1, 0.2] });
    assert_eq!((ended.len(), ended[0].places().len()), (2, 3));
    let begun = run(&mut Starts { threat: threat(), factor: 1.0 }).remove(0);
    for (place, size) in begun.places().iter().zip(sizes(&begun)) {
        assert_relative_eq!(size, if place.offset == 0 { 0.2 } else { 0.0 }, max_relative = 1e-12);
    }
}

#[test]
fn the_region_of_user_content_leaves_other_tokens_alone() {
    let (model, rows) = (decoder(), batch((0..4).map(robust).collect()));
    let embeddings = |perturbation: Option<&Perturbation>| {
        Input::of_batch(&model, &rows, perturbation, Pass::default()).unwrap().embeddings().shallow_clone()
    };
    for (region, moved) in
        [(Region::UserContent, &[TokenKind::User][..]), (Region::Prompt, &[TokenKind::User, TokenKind::Template])]
    {
        let mut attack = Pgd { threat: ThreatModel { region, ..threat() }, ..Pgd::default() };
        let outcome = run(&mut attack, &AttackSettings::default(), &model, &rows);
        let change = embeddings(Some(&outcome.perturbations[0])) - embeddings(None);
        let change = numbers(&change.norm_scalaropt_dim(2, [1], false));
        for (change, kind) in change.iter().zip(rows.layout().kinds()) {
            assert_eq!(*change > 0.0, moved.contains(kind), "{region:?}: {kind:?}");
        }
    }
}

/// Returns, or first tries, or takes the gradient at, a perturbation that it was not allowed.
struct Astray {
    threat: ThreatModel,
    place: Option<Place>,
    site: Site,
    with: fn(&mut Probe, &Perturbation) -> Result<()>,
}

impl EmbeddingAttack for Astray {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut places = probe.places()[..1].to_vec();
        places.extend(self.place);
        let values = Tensor::zeros([places.len() as i64, HIDDEN], (Kind::Double, Device::Cpu));
        let found = Perturbation::new(places, vec![(self.site, values)])?;
        (self.with)(probe, &found)?;
        Ok(vec![found])
    }
}

#[test]
fn what_lies_outside_region_or_sites_is_refused() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let threat = ThreatModel { region: Region::UserContent, sites: vec![Site::Block(1)], ..threat() };
    let run = |place, site, with| {
        let mut attack = Astray { threat: threat.clone(), place, site, with };
        let settings = AttackSettings::default();
        attacked(&mut attack, &mut TargetCrossEntropy, settings, &model, &rows).map(|_| ()).map_err(|e| e.to_string())
    };
    let ways: [fn(&mut Probe, &Perturbation) -> Result<()>; 3] = [
        |_, _| Ok(()),
        |probe, found| probe.value(found).map(|_| ()),
        |probe, found| probe.gradient(found).map(|_| ()),
    ];
    for with in ways {
        assert!(run(None, Site::Block(1), with).is_ok());
        // A token of the template, and a row that is not there.
        for place in [Place { row: 1, offset: 0 }, Place { row: 3, offset: 2 }] {
            let error = run(Some(place), Site::Block(1), with).unwrap_err();
            assert!(error.contains("UserContent") && error.contains(&format!("{place:?}")), "{error}");
        }
        for site in [Site::Embeddings, Site::Block(0)] {
            let error = run(None, site, with).unwrap_err();
            assert!(error.contains("[Block(1)]") && error.contains(&format!("found {site:?}")), "{error}");
        }
    }
}

/// A random point, mostly at the edge of the ball.
struct Random(ThreatModel);

impl EmbeddingAttack for Random {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let radius = probe.radius();
        Ok(vec![probe.draw(&StandardNormal)?.map(|values| Ok(values * radius))?])
    }

    fn is_random(&self) -> bool {
        true
    }
}

#[test]
fn restarts_that_would_end_alike_are_refused_and_others_are_not() {
    let (model, rows) = (decoder(), batch((0..4).map(robust).collect()));
    let settings = |start, restarts, warm_start, dropout| AttackSettings {
        start,
        restarts,
        warm_start,
        dropout,
        ..AttackSettings::default()
    };
    let (zero, uniform) = (Start::Zero, Start::Uniform);
    let (pgd, boxed) = (Pgd::default(), Box::new(Random(threat())) as Box<dyn EmbeddingAttack>);
    for (attack, settings, most) in [
        (&pgd as &dyn EmbeddingAttack, settings(zero, 2, false, false), Some(1)),
        (&pgd, settings(zero, 2, true, false), None),
        (&pgd, settings(zero, 3, true, false), Some(2)),
        (&pgd, settings(zero, 3, false, true), None),
        (&pgd, settings(uniform, 3, false, false), None),
        (&boxed, settings(zero, 3, false, false), None),
    ] {
        let what = format!("{settings:?}");
        let restarts = settings.restarts;
        let made = AttackRunner::new(settings, attack, &model).map(|_| ());
        match most {
            None => made.unwrap_or_else(|error| panic!("{what}: {error}")),
            Some(most) => {
                let error = made.expect_err(&what).to_string();
                let expected = format!("attack_settings.restarts = {restarts}: must be at most {most} where");
                assert!(error.starts_with(&expected), "{error}");
            }
        }
    }
    // They do end apart: the best of four is better.
    let losses = |restarts| {
        let outcome = run(&mut Random(threat()), &settings(zero, restarts, false, false), &model, &rows);
        harmful_loss(&model, &rows, &outcome.perturbations[0])
    };
    assert_never_worse(&losses(4), &losses(1));
}

#[test]
fn the_measuring_attack_is_the_methods() {
    let threat = ThreatModel { region: Region::UserContent, ..threat() };
    let expected = Pgd {
        threat: threat.clone(),
        steps: 20,
        rule: StepRule::L2,
        momentum: Some(Momentum { decay: 0.9 }),
        size: StepSize::Decaying(1.0),
    };
    assert_eq!(Pgd::measuring(threat), expected);
    let expected = AttackSettings {
        start: Start::Uniform,
        restarts: 3,
        iterate: Iterate::Best,
        warm_start: false,
        dropout: false,
    };
    assert_eq!(AttackSettings::measuring(), expected);
}

#[test]
fn an_attack_that_returns_nothing_is_refused() {
    let mut nothing = FirstTokens { threat: threat(), sizes: Vec::new() };
    let rows = batch(vec![robust(1)]);
    let settings = AttackSettings::default();
    let error = attacked(&mut nothing, &mut TargetCrossEntropy, settings, &decoder(), &rows).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "perturbations of an attack: expected at least one, found 0");
}

#[test]
fn a_row_is_attacked_alike_in_any_company() {
    let model: Decoder = decoder();
    // Adam's epsilon feels how large a gradient is.
    for rule in [StepRule::L2, StepRule::Adam { beta1: 0.9, beta2: 0.99, epsilon: 0.1 }] {
        let attack = |numbers: &[usize]| {
            let rows = batch(numbers.iter().map(|number| robust(*number)).collect());
            let mut attack = Pgd { rule, ..steps(StepSize::Decaying(1.0)) };
            run(&mut attack, &AttackSettings::default(), &model, &rows)
        };
        let together = attack(&[0, 1, 2, 3]);
        let mut last = 0.0;
        for number in 0..4 {
            let alone = attack(&[number]);
            last += alone.statistics.objective_last;
            let rows = row(&together.perturbations[0], number).into_iter().zip(row(&alone.perturbations[0], 0));
            for (together, alone) in rows {
                assert!((together - alone).abs() < 1e-9 * RADIUS, "{rule:?}, row {number}");
            }
        }
        assert_relative_eq!(together.statistics.objective_last, last, max_relative = 1e-9);
    }
}

/// Notes the objective and the gradient of the same candidate, three times.
struct SameAgain {
    threat: ThreatModel,
    seen: Vec<(Vec<f64>, Vec<f64>)>,
}

impl EmbeddingAttack for SameAgain {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let zero = probe.zero()?;
        for _ in 0..3 {
            let found = probe.gradient(&zero)?;
            self.seen.push((numbers(&found.values), numbers(values(&found.gradient))));
        }
        Ok(vec![zero])
    }
}

#[test]
fn dropout_in_the_attack_is_redrawn_at_every_pass_and_off_by_default() {
    let (model, rows) = (adapted(0.5), batch((0..3).map(robust).collect()));
    let seen = |settings: AttackSettings| {
        let mut attack = SameAgain { threat: threat(), seen: Vec::new() };
        run(&mut attack, &settings, &model, &rows);
        attack.seen
    };
    let clean = numbers(&cross_entropy(&model, &rows, ContinuationKind::Harmful, None));
    let off = seen(AttackSettings::default());
    for (found, expected) in off[0].0.iter().zip(clean) {
        assert_relative_eq!(found, &expected, max_relative = 1e-9);
    }
    assert!(off[0] == off[1] && off[1] == off[2]);
    assert!(off == seen(AttackSettings::default()));
    let on = seen(AttackSettings { dropout: true, ..AttackSettings::default() });
    for (one, other) in [(&on[0], &on[1]), (&on[1], &on[2]), (&on[0], &on[2]), (&on[0], &off[0])] {
        assert!(one.0.iter().zip(&other.0).all(|(one, other)| (one - other).abs() > 1e-6), "{one:?}, {other:?}");
        assert_ne!(one.1, other.1);
    }
}

/// Steps of 1e-4, and a look at each gradient's dtype.
struct SmallSteps(ThreatModel);

impl EmbeddingAttack for SmallSteps {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut found = probe.start()?;
        for _ in 0..3 {
            let gradient = probe.gradient(&found)?;
            assert_eq!((gradient.values.kind(), values(&gradient.gradient).kind()), (Kind::Float, Kind::Float));
            found = found.zip(&gradient.gradient, |d, gradient| Ok(d - gradient.sign() * 1e-4))?;
        }
        Ok(vec![found])
    }
}

#[test]
fn small_steps_are_not_rounded_away_under_a_model_in_bfloat16() {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2
    });
    let model = Decoder::random(json, 0.5, 3, Kind::BFloat16, Device::Cpu).unwrap();
    let rows = batch((0..4).map(robust).collect());
    for attack in [
        &mut SmallSteps(threat()) as &mut dyn EmbeddingAttack,
        &mut Pgd { threat: threat(), steps: 3, size: StepSize::Absolute(1e-4), ..Pgd::default() },
    ] {
        let found = run(attack, &AttackSettings::default(), &model, &rows).perturbations.remove(0);
        let d = values(&found);
        assert_eq!((d.kind(), model.embedding().kind()), (Kind::Float, Kind::BFloat16));
        let whole = numbers(&(d / 1e-4));
        assert!(whole.iter().all(|steps| (steps - steps.round()).abs() < 1e-3 && steps.abs() < 3.001), "{whole:?}");
        assert!(whole.iter().filter(|steps| steps.abs() > 0.5).count() > whole.len() / 2);
        // What the model reads is E + d in float32, most of which bfloat16 would have rounded back to E.
        let tokens = found.tokens(rows.layout()).unwrap();
        let read = |perturbation| {
            let input = Input::of_batch(&model, &rows, perturbation, Pass::default()).unwrap();
            input.embeddings().index_select(0, &tokens)
        };
        let (with, without) = (read(Some(&found)), read(None));
        assert!(with.equal(&(&without + d)) && with.kind() == Kind::Float);
        let lost =
            (without.to_kind(Kind::BFloat16) + d.to_kind(Kind::BFloat16)).to_kind(Kind::Float).eq_tensor(&without);
        assert!(lost.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]) > 0.5);
    }
}

#[test]
fn the_published_step_never_reaches_the_ball_and_ours_does() {
    let published = Pgd { size: StepSize::Absolute(1e-4), ..Pgd::default() };
    // Ten steps of 1e-4 on each of 2048 numbers.
    assert_relative_eq!(published.reach(2048, 0.32).unwrap(), 1e-3 * 2048f64.sqrt(), max_relative = 1e-12);
    assert!(published.reach(2048, 0.32).unwrap() < 0.046);
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let run = |size| {
        let mut attack = Pgd { threat: threat(), size, ..Pgd::default() };
        let reach = attack.reach(HIDDEN, RADIUS).unwrap();
        let outcome = run(&mut attack, &AttackSettings::default(), &model, &rows);
        let largest = sizes(&outcome.perturbations[0]).into_iter().fold(0.0, f64::max);
        assert!(largest <= reach * (1.0 + 1e-12));
        (reach, largest, outcome.statistics.tokens_at_edge)
    };
    let (reach, largest, at_edge) = run(StepSize::Absolute(1e-4));
    assert!(reach < RADIUS && largest > 0.5 * reach && at_edge == 0);
    let (reach, _, at_edge) = run(StepSize::Decaying(1.0));
    assert!(reach > RADIUS && at_edge > 0, "{reach}, {at_edge}");
}

#[test]
fn without_bounds_steps_go_beyond_the_radius() {
    let (model, rows) = (decoder(), batch((0..3).map(robust).collect()));
    let largest = |bounded| {
        let mut attack = steps(StepSize::Constant(1.0));
        attack.threat.bounded = bounded;
        let outcome = run(&mut attack, &AttackSettings::default(), &model, &rows);
        sizes(&outcome.perturbations[0]).into_iter().fold(0.0, f64::max)
    };
    assert!(largest(false) > 1.5 * RADIUS);
    assert!(largest(true) <= RADIUS * (1.0 + 1e-12));
}
