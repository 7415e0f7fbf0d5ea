//! Steps of projected gradient descent against formulas, in every norm.

#[path = "common/attacks.rs"]
mod attacks;
#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    AttackSettings, Batch, ContinuationKind, Decoder, EmbeddingAttack, Iterate, Momentum, Norm, Perturbation, Pgd,
    Region, Site, Start, StepRule, StepSize, ThreatModel,
    tch::{Kind, Tensor},
};
use approx::assert_relative_eq;
use attacks::{RADIUS, assert_near, norm, row, run, sizes, steps, threat, values};
use toy::{Bigram, HIDDEN, batch, cross_entropy, decoder, numbers, robust};

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

fn roots(vector: Vec<f64>) -> Vec<f64> {
    unit(vector.into_iter().map(|one| one.signum() * one.abs().sqrt()).collect())
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
        (StepRule::Root, None, StepSize::Decaying(0.8), hand.descend(&decaying(0.8 * RADIUS), |g, _| roots(g))),
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
fn a_row_is_attacked_alike_in_any_company() {
    let model: Decoder = decoder();
    // Adam's epsilon feels how large a gradient is.
    for rule in [StepRule::Adam { beta1: 0.9, beta2: 0.99, epsilon: 0.1 }, StepRule::L2] {
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
